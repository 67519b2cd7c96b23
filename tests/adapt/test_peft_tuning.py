"""Training by a method's name: every method learns and is saved, rates are chosen, costs are whole, bad input."""

import math

import pytest
import torch
from datasets import Dataset

from downriver import models
from downriver.adapt import load_bottleneck, load_loramoe, merge_adapter, peft
from downriver.adapt.peft_catalogue import known, method
from downriver.adapt.peft_tuning import _held_out, _orthogonality, sweep
from downriver.core import DownriverError, InputError, metered
from downriver.models import small
from downriver.study.compose import load as compose
from downriver.tasks import Task

QUICK = ("bottleneck", "cpt", "fish_mask", "ia3", "loramoe", "prefix_tuning")
NAMES = [n for n in (*known(), "full") if n != "bitfit"]  # Llama has no biases


@pytest.fixture(scope="module")
def task():
    text = [f"the river {i % 5} runs to the sea" for i in range(24)]
    parts = {"train": text[:16], "validation": text[16:]}
    splits = {name: Dataset.from_dict({"text": part}) for name, part in parts.items()}
    return Task("river", "language-modelling", splits, ("text",), None)


@pytest.fixture(scope="module")
def lm():
    return small("causal-lm", "nano")


@pytest.fixture(scope="module")
def adapters(lm, task, tmp_path_factory):
    folders = {}
    for seed in range(2):
        tuned = peft(lm, task, "8 examples", batch_size=4, learning_rates=[1e-2], seed=seed)
        folders[str(seed)] = str(tuned.save(tmp_path_factory.mktemp("adapters") / str(seed)))
    return folders


def loss(model, task):
    return _held_out(model, task, 8)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_every_method_trains_by_its_name(name, lm, task, adapters, tmp_path):
    """What was trained differs from a fresh adapter, and is the same again from disk."""
    e = lm.processor("e", add_special_tokens=False)["input_ids"]
    given = {"vblora": {"num_vectors": 16}, "alora": {"alora_invocation_tokens": e}, "xlora": {"adapters": adapters}}
    settings = given.get(name, {})
    rate = 1e-3 if name == "full" else known()[name].learning_rate
    tuned = peft(lm, task, "6 steps", tuner=name, batch_size=8, learning_rates=[rate], settings=settings)
    after = loss(tuned, task)
    assert math.isfinite(after)
    start = lm
    if name in known() and name != "fish_mask":
        given = {"cpt_token_ids": tuned.backbone.peft_config["default"].cpt_token_ids} if name == "cpt" else settings
        start = method(name).add(lm, method(name).config(lm, **given), task=task)
    assert after != loss(start, task)
    folder = tuned.save(tmp_path / "saved")
    again = {"bottleneck": load_bottleneck, "loramoe": load_loramoe}.get(name, models.load)(folder)
    assert loss(again, task) == pytest.approx(after, abs=1e-4)


def test_the_best_of_the_rates_is_kept(lm, task):
    """One rate that does nothing, one that learns, one that destroys."""
    found = sweep(lm, task, "96 examples", batch_size=8, learning_rates=[1e-8, 1e-2, 1e3])
    kept = found.model
    assert found.rate == 1e-2 and found.losses[1e-2] == loss(kept, task)
    assert found.losses[1e-8] == pytest.approx(loss(lm, task), abs=1e-3) and found.losses[1e3] > found.losses[1e-2]
    alone = peft(lm, task, "96 examples", batch_size=8, learning_rates=[1e-2])
    assert loss(kept, task) == loss(alone, task) < loss(lm, task) - 0.3


def test_every_run_is_charged(lm, task):
    with metered() as one:
        peft(lm, task, "16 examples", batch_size=8, learning_rates=[1e-3])
    with metered() as three:
        tuned = peft(lm, task, "16 examples", batch_size=8)
    assert one.cost.examples == 16 and three.cost.examples == 48
    assert three.cost.flops > 3 * one.cost.flops  # and the validation
    assert one.cost.trained_parameters == tuned.backbone.get_nb_trainable_parameters()[0]


def test_a_budget_of_parameters(lm, task):
    with metered() as meter:
        peft(lm, task, "8 examples", batch_size=8, tuner="vera", budget_params=2000, learning_rates=[1e-2])
    assert 1500 < meter.cost.trained_parameters <= 2000


def test_the_base_stays(lm, task):
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    tuned = peft(lm, task, "16 examples", batch_size=8, tuner="lokr", learning_rates=[1e-2])
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
    with tuned.backbone.disable_adapter():
        assert loss(tuned, task) == pytest.approx(loss(lm, task), abs=1e-6)
    assert loss(merge_adapter(tuned), task) == pytest.approx(loss(tuned, task), abs=1e-5)


def test_the_ranks_of_adalora(lm, task):
    """After half of the run as many ranks are left as the target asks for."""
    tuned = peft(lm, task, "20 steps", batch_size=4, tuner="adalora", learning_rates=[1e-2])
    layers = tuned.backbone.base_model.peft_config["default"]
    assert (layers.total_step, layers.tinit, layers.tfinal) == (20, 2, 10)
    left = sum(sum(ranks) for ranks in layers.rank_pattern.values())
    assert left == 14 * layers.target_r < 14 * layers.init_r
    eye = torch.eye(layers.init_r)
    shares = [
        (p @ p.T - eye if "lora_A" in n else p.T @ p - eye).norm()
        for n, p in tuned.backbone.named_parameters()
        if "lora_A" in n or "lora_B" in n
    ]
    assert float(_orthogonality(tuned, None, None)) == pytest.approx(float(torch.stack(shares).mean()))


@pytest.mark.parametrize(
    "tuner",
    [
        "bitfit",
        "prompt_tuning",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("bottleneck", "fish_mask", "poly")),
    ],
)
def test_classification_with_an_encoder(tuner, letters, score):
    rows = {"train": letters.rows("train"), "validation": letters.rows("validation")}
    task = Task("letters", letters.kind, rows, letters.inputs, letters.target, letters.labels)
    rate = 5e-2 if tuner != "fish_mask" else 1e-2
    tuned = peft(small("text-encoder", "nano"), task, "640 examples", tuner=tuner, learning_rates=[rate])
    assert score(tuned, letters)[0] > 0.8


def test_prompts_for_a_language_model_with_a_head(lm, letters, score, tmp_path):
    tuned = peft(lm, letters, "320 examples", tuner="prefix_tuning", learning_rates=[1e-2])
    before = score(tuned, letters)
    assert score(models.load(tuned.save(tmp_path / "saved")), letters) == before


def test_studies_run_it_by_name(tmp_path):
    study = compose(
        {
            "name": "two-ways",
            "model": "small:mlp:nano:0",
            "task": "wine",
            "budget": "64 examples",
            "seeds": 1,
            "arms": {
                "lora": {"adapt": {"method": "peft", "learning_rates": [1e-2]}},
                "miss": {"adapt": {"method": "peft", "tuner": "miss", "learning_rates": [1e-2], "budget_params": 500}},
            },
        }
    )
    result = study.run(tmp_path, executor="serial", progress=False)
    assert not result.failures and set(result.rows()["arm"]) == {"lora", "miss"}


def test_bad_input(lm, task):
    one = {name: rows for name, rows in task.splits.items() if name == "train"}
    alone = Task("alone", task.kind, one, task.inputs, None)
    with pytest.raises(InputError, match=r"3 learning rates are compared .* learning_rates=\[0.005\]"):
        peft(lm, alone, "8 examples", tuner="ia3")
    with pytest.raises(InputError, match="unknown PEFT method 'lorra'"):
        peft(lm, task, "8 examples", tuner="lorra")
    with pytest.raises(InputError, match="learning_rates is empty"):
        peft(lm, task, "8 examples", learning_rates=[])
    with pytest.raises(InputError, match="full trains all weights"):
        peft(lm, task, "8 examples", tuner="full", budget_params=5)
    with pytest.raises(InputError, match="has no biases"):
        peft(lm, task, "32 examples", tuner="bitfit")
    with pytest.raises(DownriverError, match="the loss is nan"):
        peft(lm, task, "64 examples", batch_size=4, learning_rates=[1e30], warmup=0.0)
