"""``fine_tune``: budgets, seeds, costs, regularisers, checkpoints, every kind of task."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from torch import nn
from transformers import TrainerCallback

from downriver.adapt import Term, fine_tune
from downriver.core import Budget, DownriverError, InputError, metered
from downriver.models import Model, small
from downriver.tasks import Task
from downriver.training.trainer import Batches, tokens_in


class Logs(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **_):
        self.seen.append(dict(logs) | {"step": state.global_step})

    def column(self, name):
        return [entry[name] for entry in self.seen if name in entry]


class StopAt(TrainerCallback):
    """The power fails at the end of a step."""

    def __init__(self, step, kill=False):
        self.step, self.kill = step, kill

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt


def same(a: Model, b: Model) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture
def headed(encoder, letters):
    torch.manual_seed(0)
    return encoder.with_head(letters)


def test_it_learns_and_the_model_given_stays(headed, letters, score, weights):
    before = weights(headed)
    tuned = fine_tune(headed, letters, "800 examples", learning_rate=1e-3)
    assert score(headed, letters)[0] < 0.8
    assert score(tuned, letters)[0] > 0.95
    assert all(torch.equal(before[name], tensor) for name, tensor in headed.state_dict().items())
    assert not tuned.training
    assert all(p.grad is None and p.requires_grad for p in tuned.parameters())
    assert tuned.processor is headed.processor


def test_a_model_is_trained_in_place_on_request(headed, letters):
    assert fine_tune(headed, letters, "2 steps", learning_rate=1e-3, in_place=True) is headed


def test_only_the_seed_decides(headed, letters):
    def run(seed):
        return fine_tune(headed, letters, "6 steps", learning_rate=1e-3, batch_size=4, seed=seed)

    first = run(3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert same(first, run(3))
    assert torch.equal(state, torch.get_rng_state())
    assert not same(first, run(4))


def test_every_row_is_visited_once_an_epoch_in_a_new_order():
    rows = Dataset.from_dict({"x": list(range(10))})
    batches = Batches(rows, lambda rows: [row["x"] for row in rows], seed=1, length=40)
    visits = [x for start in range(0, 40, 4) for x in batches.__getitems__(list(range(start, start + 4)))]
    epochs = [visits[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert batches.__getitems__([38]) == visits[38:39]


def test_cost_is_exact(headed, letters):
    with metered() as short:
        fine_tune(headed, letters, "5 steps", learning_rate=1e-4, batch_size=8, seed=2)
    with metered() as long:
        fine_tune(headed, letters, "10 steps", learning_rate=1e-4, batch_size=8, seed=2)
    visits = Batches(letters.rows("train"), headed.collate(letters), seed=2)
    seen = sum(tokens_in(visits.__getitems__(list(range(i, i + 8)))) for i in range(0, 40, 8))
    size = sum(p.numel() for p in headed.parameters())
    assert (short.cost.examples, long.cost.examples) == (40, 80)
    assert short.cost.tokens == seen
    assert short.cost.flops > 0
    assert long.cost.flops == 2 * short.cost.flops
    assert short.cost.parameters == short.cost.trained_parameters == size


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    rows = {f"x{i}": x[:, i].tolist() for i in range(4)} | {"y": (x[:, 0] > 0).astype(int).tolist()}
    columns = tuple(f"x{i}" for i in range(4))
    return Task("table", "tabular-classification", {"train": Dataset.from_dict(rows)}, columns, "y")


def test_your_own_module_learns_and_its_flops_are_those_of_its_products(table):
    model = Model(nn.Sequential(nn.Linear(4, 8), nn.Tanh())).with_head(table)
    with metered() as meter:
        tuned = fine_tune(model, table, "40 steps", learning_rate=0.05, batch_size=10)
    first, second = 2 * 10 * 4 * 8, 2 * 10 * 8 * 2  # each product: n x inputs x outputs, multiply and add
    assert meter.cost.flops == 40 * (first + second + first + 2 * second)  # backward: weights, and inputs of the second
    assert meter.cost.tokens == 0
    batch = model.collate(table)(list(table.rows("train")))
    assert tuned(**batch)["loss"] < 0.5 * model(**batch)["loss"]


@pytest.mark.parametrize("unit", ["steps", "examples", "tokens", "flops"])
def test_a_budget_is_spent_and_not_exceeded(headed, letters, unit):
    with metered() as one:
        fine_tune(headed, letters, "1 steps", learning_rate=1e-4, batch_size=8)
    price = {"steps": 1, "examples": 8, "tokens": one.cost.tokens, "flops": one.cost.flops}[unit]
    with metered() as meter:
        fine_tune(headed, letters, Budget(9.5 * price, unit), learning_rate=1e-4, batch_size=8)
    used = meter.cost.examples / 8 if unit == "steps" else getattr(meter.cost, unit)
    assert 8 * price <= used <= 9.5 * price


def test_a_budget_in_seconds_ends_and_its_schedule_reaches_the_end(headed, letters):
    logs = Logs()
    with metered() as meter:
        fine_tune(headed, letters, "1 s", learning_rate=1e-3, batch_size=4, callbacks=[logs])
    assert meter.cost.examples >= 4
    rates = logs.column("learning_rate")
    assert max(rates) <= 1e-3
    assert rates[-1] < max(rates)


def test_the_rate_warms_up_and_falls(headed, letters):
    logs = Logs()
    fine_tune(headed, letters, "20 steps", learning_rate=1e-3, batch_size=2, callbacks=[logs], warmup=0.1)
    rates = logs.column("learning_rate")
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3])
    assert rates[3:] == pytest.approx([1e-3 * (18 - i) / 18 for i in range(1, 18)])
    logs = Logs()
    fine_tune(
        headed, letters, "5 steps", learning_rate=1e-3, batch_size=2, callbacks=[logs], warmup=0, schedule="constant"
    )
    assert logs.column("learning_rate") == pytest.approx([1e-3] * 5)


def test_frozen_parameters_stay_and_cost_less(headed, letters):
    with metered() as whole:
        fine_tune(headed, letters, "3 steps", learning_rate=1e-2)
    with metered() as part:
        tuned = fine_tune(
            headed, letters, "3 steps", learning_rate=1e-2, trainable=lambda name: name.startswith("head.")
        )
    assert part.cost.flops < 0.5 * whole.cost.flops
    assert part.cost.trained_parameters == 32 * 2 + 2
    moved = {name for name, tensor in tuned.state_dict().items() if not torch.equal(tensor, headed.state_dict()[name])}
    assert moved == {"head.weight", "head.bias"}
    assert all(p.requires_grad for p in tuned.parameters())


def test_buffers_are_not_touched_by_the_measurement(table):
    model = Model(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))).with_head(table)
    tuned = fine_tune(model, table, "7 steps", learning_rate=1e-3, batch_size=10)
    assert int(tuned.backbone[1].num_batches_tracked) == 7


def start_distance(model):
    start = [p.detach().clone() for p in model.parameters()]

    def l2(model, batch, outputs):
        return sum((p - s).square().sum() for p, s in zip(model.parameters(), start, strict=True))

    return l2


def test_a_term_holds_the_model_back_and_is_logged(headed, letters):
    distance = start_distance(headed)

    def run(weight):
        logs = Logs()
        terms = [Term("distance", weight, distance)]
        tuned = fine_tune(headed, letters, "30 steps", learning_rate=1e-3, terms=terms, callbacks=[logs])
        return tuned, logs

    free, logs = run(0.0)
    held, _ = run(10.0)
    assert same(free, fine_tune(headed, letters, "30 steps", learning_rate=1e-3))
    assert distance(held, None, None) < 0.2 * distance(free, None, None)
    values = logs.column("distance")
    assert values[0] == 0
    assert values[-1] == pytest.approx(distance(free, None, None).item(), rel=0.1)


def test_a_term_sees_batch_and_outputs_and_its_weight_counts(headed, letters):
    """A term equal to the loss, with weight 1, doubles what is logged."""
    logs = Logs()
    twice = Term(
        "again", 1.0, lambda model, batch, outputs: nn.functional.cross_entropy(outputs["logits"], batch["labels"])
    )
    fine_tune(headed, letters, "3 steps", learning_rate=1e-4, terms=[twice], callbacks=[logs])
    assert logs.column("loss") == pytest.approx([2 * value for value in logs.column("again")], rel=1e-5)


def test_validation_returns_the_best_weights(headed, letters, score):
    logs = Logs()
    with metered() as meter:
        tuned = fine_tune(
            headed,
            letters,
            "24 steps",
            learning_rate=0.03,
            batch_size=4,
            schedule="constant",
            validation=6,
            callbacks=[logs],
        )
    losses = logs.column("eval_loss")
    assert len(losses) == 6
    assert losses.index(min(losses)) < 5  # so the last weights are not the best: else this test shows nothing
    assert score(tuned, letters, "validation")[1] == pytest.approx(min(losses), rel=1e-4)
    with metered() as without:
        fine_tune(headed, letters, "24 steps", learning_rate=0.03, batch_size=4)
    assert meter.cost.examples == without.cost.examples
    assert without.cost.flops < meter.cost.flops


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_printed_or_left_behind(headed, letters, capfd, monkeypatch, tmp_path, terminal):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    fine_tune(headed, letters, "3 steps", learning_rate=1e-4)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "it/s" not in printed.err  # too short for a bar
    assert not any(tmp_path.iterdir())


def test_a_long_run_shows_a_bar_on_a_terminal(headed, letters, capfd, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("downriver.training.trainer.DELAY", 0.0)
    fine_tune(headed, letters, "20 steps", learning_rate=1e-4)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "letters" in printed.err
    assert "loss=" in printed.err


def test_mixed_precision_leaves_a_plain_model(headed, letters):
    tuned = fine_tune(headed, letters, "3 steps", learning_rate=1e-3, precision="bf16")
    assert "forward" not in vars(tuned)
    assert tuned(**tuned.collate(letters)([{"text": "abc"}]))["logits"].dtype == torch.float32
    assert same(  # and the next run is not affected by it
        fine_tune(headed, letters, "3 steps", learning_rate=1e-3),
        fine_tune(headed, letters, "3 steps", learning_rate=1e-3),
    )


# --- checkpoints


def masked(folder=None, budget="24 steps", **settings):
    """A masked language model: dropout, masks and order all come from random streams."""
    rows = Dataset.from_dict({"text": ["abcabcabc", "bcabca", "cabcabcab", "abcab", "bcabcabcabc"]})
    task = Task("abc", "language-modelling", {"train": rows, "validation": rows}, ("text",), None)
    model = small("masked-lm", "nano")
    return fine_tune(model, task, budget, learning_rate=1e-3, batch_size=2, checkpoints=folder, **settings)


def killed(folder):
    masked(folder, callbacks=[StopAt(14, kill=True)])


def test_a_killed_run_continues_to_the_same_result(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(tmp_path / "run",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-12", "checkpoint-9"]
    assert not list((tmp_path / "run").rglob("training_args.bin"))
    torn = tmp_path / "run" / "checkpoint-13"  # a kill in the middle of writing leaves this
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"epoch": ')
    with metered() as meter:
        continued = masked(tmp_path / "run")
    with metered() as whole:
        undisturbed = masked(tmp_path / "other")
    assert same(continued, undisturbed)
    assert same(continued, masked())
    assert (meter.cost.examples, meter.cost.tokens, meter.cost.flops) == (48, whole.cost.tokens, whole.cost.flops)


@pytest.mark.parametrize("settings", [{"budget": "250 tokens"}, {"validation": 4}])
def test_an_interrupted_run_continues_with(settings, tmp_path):
    logs = Logs()
    with pytest.raises(KeyboardInterrupt):
        masked(tmp_path, callbacks=[StopAt(10)], **settings)
    continued = masked(tmp_path, callbacks=[logs], **settings)
    assert logs.seen[0]["step"] > 5
    assert same(continued, masked(**settings))


def test_a_finished_run_is_only_loaded(tmp_path):
    with metered() as first:
        tuned = masked(tmp_path)
    with metered() as second:
        again = masked(tmp_path, callbacks=[StopAt(1)])
    assert same(tuned, again)
    assert (first.cost.tokens, first.cost.flops) == (second.cost.tokens, second.cost.flops)


def test_a_folder_of_something_else_is_refused(tmp_path):
    masked(tmp_path / "run", "2 steps")
    with pytest.raises(InputError, match=r"differs in budget, seed"):
        masked(tmp_path / "run", "3 steps", seed=1)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        masked(tmp_path / "run", "2 steps")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="not empty"):
        masked(tmp_path / "mine", "2 steps")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


# --- kinds of task


@pytest.mark.parametrize("kind", ["causal-lm", "masked-lm"])
def test_a_language_model_gets_better_on_other_text_of_the_kind(kind, score):
    rng = np.random.default_rng(0)

    def text(n):
        return {"text": [" ".join(rng.choice(["river", "stone", "cloud"], size=6)) for _ in range(n)]}

    splits = {"train": Dataset.from_dict(text(60)), "test": Dataset.from_dict(text(30))}
    task = Task("words", "language-modelling", splits, ("text",), None)
    model = small(kind, "nano")
    tuned = fine_tune(model, task, "40 steps", learning_rate=5e-3)
    assert score(tuned, task)[1] < 0.7 * score(model, task)[1]
    assert score(model, task)[1] > 4


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_images_are_classified(kind, score):
    from sklearn.datasets import load_digits

    digits = load_digits()
    keep = np.flatnonzero(np.isin(digits.target, [0, 1, 7]))[:300]
    images = [(15.9 * digits.images[i]).astype(np.uint8) for i in keep]
    names = {0: 0, 1: 1, 7: 2}
    rows = {"image": images, "label": [names[digits.target[i]] for i in keep]}
    rows = Dataset.from_dict(rows, features=Features(image=Image(), label=Value("int64")))
    splits = {"train": rows.select(range(220)), "test": rows.select(range(220, 300))}
    task = Task("digits", "image-classification", splits, ("image",), "label", labels=("0", "1", "7"))
    tuned = fine_tune(small(kind, "nano").with_head(task), task, "50 steps", learning_rate=3e-3)
    assert score(tuned, task)[0] > 0.75


def test_a_table_is_learnt_by_an_mlp(table, score):
    tuned = fine_tune(small("mlp", "nano").with_head(table), table, "60 steps", learning_rate=1e-2)
    assert score(tuned, table, "train")[0] > 0.95


def test_numbers_are_learnt(encoder, counts, score):
    tuned = fine_tune(encoder.with_head(counts), counts, "60 steps", learning_rate=3e-3)
    variance = counts.targets("train").var()
    assert score(tuned, counts, "train")[1] < 0.3 * variance


def test_similarity_of_two_texts_is_learnt(encoder, score):
    rng = np.random.default_rng(0)
    words = ["abc", "cab", "xyz", "zyx"]
    pairs = [rng.choice(words, size=2) for _ in range(80)]
    rows = {"a": [p[0] for p in pairs], "b": [p[1] for p in pairs]}
    rows["same"] = [float((a in words[:2]) == (b in words[:2])) for a, b in pairs]
    task = Task("pairs", "text-similarity", {"train": Dataset.from_dict(rows)}, ("a", "b"), "same")
    tuned = fine_tune(encoder.with_head(task), task, "40 steps", learning_rate=3e-3)
    assert score(tuned, task, "train")[1] < 0.5 * score(encoder, task, "train")[1]
    with metered() as meter:
        fine_tune(encoder, task, "1 steps", learning_rate=1e-3, batch_size=3)
    assert meter.cost.tokens == 3 * 2 * 5  # both texts: three letters between two marks


# --- bad input


@pytest.mark.parametrize(("x", "what"), [(1e10, "loss"), (1e-12, "gradient's norm")])
def test_what_is_not_finite_is_named_with_step_and_rate(x, what):
    rows = Dataset.from_dict({"x": [x, -x, 2 * x, 3 * x], "y": [1.0, 2.0, 3.0, 4.0]})
    task = Task("extreme", "tabular-regression", {"train": rows}, ("x",), "y")
    model = Model(nn.Linear(1, 4, bias=False)).with_head(task)
    nn.init.constant_(model.backbone.weight, 1.0)
    nn.init.constant_(model.head.weight, 1e30)
    with pytest.raises(DownriverError, match=rf"the {what} is inf at step 1, where the learning rate is 0\.01"):
        fine_tune(model, task, "9 steps", learning_rate=0.01, batch_size=4, warmup=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0}, "learning_rate is 0: a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"batch_size": 0}, "batch_size is 0: at least 1"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"warmup": 1.0}, "warmup is 1.0: a share of the run"),
        ({"validation": -1}, "validation is -1"),
        ({"schedule": "linea"}, "did you mean 'linear'"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"budget": "8 examples"}, "does not pay for one step, which takes 16 examples with batch_size=16"),
        ({"budget": "10 flops"}, "does not pay for one step"),
        ({"budget": "3 tokens"}, "does not pay for one step"),
        ({"trainable": lambda name: False}, "no parameter is to be trained"),
        ({"terms": [Term("a", 1, lambda m, b, o: o["logits"])]}, "term 'a' gives torch.Size"),
        ({"terms": [Term("a", 1, start_distance), Term("a", 1, start_distance)]}, "two terms have the same name: a, a"),
    ],
)
def test_a_bad_parameter_is_named(headed, letters, settings, message):
    with pytest.raises(InputError, match=message):
        fine_tune(headed, letters, **({"budget": "16 examples", "learning_rate": 1e-3} | settings))


def test_a_bad_task_is_named(headed, encoder, letters, thirds, table):
    test_only = Task("bare", "text-classification", {"test": letters.rows("test")}, ("text",), "label")
    with pytest.raises(InputError, match="unknown split of task 'bare' 'train'"):
        fine_tune(headed, test_only, "1 steps", learning_rate=1e-3)
    with pytest.raises(InputError, match="unknown split of task 'thirds' 'validation'"):
        fine_tune(encoder.with_head(thirds), thirds, "1 steps", learning_rate=1e-3, validation=1)
    with pytest.raises(InputError, match="has no head"):
        fine_tune(encoder, letters, "1 steps", learning_rate=1e-3)
    with pytest.raises(InputError, match="gives 2 outputs and task 'thirds' needs 3"):
        fine_tune(headed, thirds, "1 steps", learning_rate=1e-3)
    with pytest.raises(InputError, match="cannot do the tabular-classification task"):
        fine_tune(headed, table, "1 steps", learning_rate=1e-3)
    mlp = small("mlp", "nano").with_head(table)
    with pytest.raises(InputError, match="counts no tokens"):
        fine_tune(mlp, table, "100 tokens", learning_rate=1e-3)
