"""The linear probe: scikit-learn's own numbers, folded into the head; what it reads and what that costs."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from downriver.adapt import linear_probe
from downriver.core import InputError, metered
from downriver.models import Model, small
from downriver.models.features import extract
from downriver.tasks import Task


def logits(model, task, split="train"):
    with torch.no_grad():
        return model(**model.collate(task)(list(task.rows(split))))["logits"].numpy()


def reference(estimator, model, task):
    """scikit-learn's pipeline on the features of all training rows."""
    x = extract(model, task.rows("train"), task).astype(np.float64)
    return make_pipeline(StandardScaler(), estimator).fit(x, task.targets("train")), x


def test_logits_are_those_of_scikit_learn(encoder, thirds):
    fitted, x = reference(LogisticRegression(C=1 / 5.0, max_iter=1000), encoder, thirds)
    probed = linear_probe(encoder, thirds, "1000 examples", l2=5.0)
    np.testing.assert_allclose(logits(probed, thirds), fitted.decision_function(x), atol=1e-5)


def test_two_classes_share_the_log_odds(encoder, letters):
    fitted, x = reference(LogisticRegression(C=0.5, max_iter=1000), encoder, letters)
    found = logits(linear_probe(encoder, letters, "1000 examples", l2=2.0), letters)
    np.testing.assert_allclose(found[:, 1] - found[:, 0], fitted.decision_function(x), atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-5)


def test_numbers_are_ridge_regression(encoder, counts):
    fitted, x = reference(Ridge(alpha=3.0), encoder, counts)
    probed = linear_probe(encoder, counts, "1000 examples", l2=3.0)
    np.testing.assert_allclose(logits(probed, counts)[:, 0], fitted.predict(x), atol=1e-5)


def test_it_learns_and_only_the_head_is_new(encoder, letters, score, weights):
    before = weights(encoder)
    probed = linear_probe(encoder, letters, "120 examples")
    assert score(probed, letters)[0] > 0.95
    assert encoder.head is None
    for name, tensor in before.items():
        assert torch.equal(tensor, encoder.state_dict()[name])
        assert torch.equal(tensor, probed.state_dict()[name])
    assert all(p.requires_grad for p in probed.parameters())


def test_the_strength_is_chosen_on_held_out_rows():
    """Noise wants the strongest penalty, a clean boundary the weakest; the choice shows in the size of the weights."""
    x = np.random.default_rng(0).normal(size=(400, 20))
    for labels, expected in [
        (np.random.default_rng(1).integers(2, size=400), 1000.0),
        ((x[:, 0] > 0).astype(int), 1.0),
    ]:
        rows = {f"x{i}": x[:, i].tolist() for i in range(20)} | {"y": labels.tolist()}
        task = Task("noise", "tabular-classification", {"train": Dataset.from_dict(rows)}, tuple(rows)[:20], "y")
        chosen = linear_probe(Model(nn.Identity()), task, "400 examples")
        fixed = linear_probe(Model(nn.Identity()), task, "400 examples", l2=expected)
        assert torch.equal(chosen.head.weight, fixed.head.weight)


def test_a_dead_feature_gets_a_harmless_weight():
    x = np.random.default_rng(0).normal(size=(50, 3)) * [1, 1, 1e-30]
    rows = {
        "a": x[:, 0].tolist(),
        "b": x[:, 1].tolist(),
        "c": x[:, 2].tolist(),
        "y": (x[:, 0] > 0).astype(int).tolist(),
    }
    task = Task("dead", "tabular-classification", {"train": Dataset.from_dict(rows)}, ("a", "b", "c"), "y")
    probed = linear_probe(Model(nn.Identity()), task, "50 examples", l2=1.0)
    assert probed.head.weight[:, 2].abs().max() < 1e-3
    assert probed.head.weight[:, 0].abs().max() > 0.1


def test_a_class_without_a_row_gets_half_a_row(encoder):
    rows = Dataset.from_dict({"text": ["aaaa", "zzzz", "aaa", "zzz"] * 5, "label": [0, 2, 0, 2] * 5})
    task = Task("gap", "text-classification", {"train": rows}, ("text",), "label", labels=("a", "m", "z"))
    probed = linear_probe(encoder, task, "20 examples", l2=1.0)
    assert torch.equal(probed.head.weight[1], torch.zeros(32))
    share = torch.softmax(torch.from_numpy(logits(probed, task)), dim=1)[:, 1].mean().item()
    assert share == pytest.approx(0.5 / 20, rel=0.2)
    assert (logits(probed, task).argmax(axis=1) == task.targets("train")).all()


def test_cost_is_that_of_the_rows_read(encoder, letters):
    with metered() as meter:
        linear_probe(encoder, letters, "40 examples", seed=1)
    sample = letters.sample("train", 40, seed=1)
    read = encoder.collate(letters)(list(sample.rows("train")))
    assert meter.cost.examples == 40
    assert meter.cost.tokens == int(read["attention_mask"].sum())
    assert meter.cost.trained_parameters == 32 * 2 + 2
    assert meter.cost.parameters == sum(p.numel() for p in encoder.parameters()) + 66
    with metered() as more:
        linear_probe(encoder, letters, "80 examples", seed=1)
    assert more.cost.flops == pytest.approx(2 * meter.cost.flops)
    with metered() as most:
        linear_probe(encoder, letters, "5000 examples")
    assert most.cost.examples == 120  # all there are, once


@pytest.mark.parametrize(
    ("budget", "rows"),
    [("3 steps", 24), ("30 examples", 30), ("300 tokens", 30), ("0.001 s", 120)],
)
def test_a_budget_buys_rows(encoder, letters, budget, rows):
    with metered() as meter:
        linear_probe(encoder, letters, budget, batch_size=8)
    if budget.endswith("s") and "steps" not in budget and "examples" not in budget and "tokens" not in budget:
        assert 2 <= meter.cost.examples <= rows
    else:
        assert meter.cost.examples == pytest.approx(rows, rel=0.15)


def test_flops_buy_rows(encoder, letters):
    with metered() as one:
        linear_probe(encoder, letters, "20 examples")
    with metered() as meter:
        linear_probe(encoder, letters, f"{2.5 * one.cost.flops} flops")
    assert meter.cost.examples == 50
    assert meter.cost.flops <= 2.5 * one.cost.flops


def test_only_the_seed_decides_which_rows(encoder, letters):
    first, again, other = (linear_probe(encoder, letters, "30 examples", seed=seed, l2=1.0) for seed in (0, 0, 1))
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_the_cache_changes_nothing_but_time(encoder, letters, tmp_path, monkeypatch):
    monkeypatch.setenv("DOWNRIVER_CACHE", str(tmp_path))
    runs = []
    for _ in range(2):
        with metered() as meter:
            probed = linear_probe(encoder, letters, "30 examples", cache=True, l2=1.0)
        runs.append((probed.head.weight, meter.cost.flops, meter.cost.tokens))
        assert len(list(tmp_path.rglob("*.npy"))) == 1
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


def test_images_and_tables_are_probed(score):
    from sklearn.datasets import load_wine

    wine = load_wine()
    rows = {f"x{i}": wine.data[:, i].tolist() for i in range(13)} | {"y": wine.target.tolist()}
    task = Task("wine", "tabular-classification", {"train": Dataset.from_dict(rows)}, tuple(rows)[:13], "y")
    probed = linear_probe(small("mlp", "nano"), task, "178 examples")
    assert score(probed, task, "train")[0] > 0.95


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "1 examples"}, "pays for 1 rows of 'letters': two at least"),
        ({"budget": "10 flops"}, "pays for 0 rows"),
        ({"l2": 0.0}, "l2 is 0.0: a positive number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"budget": "lots"}, "budget 'lots'"),
    ],
)
def test_a_bad_parameter_is_named(encoder, letters, settings, message):
    with pytest.raises(InputError, match=message):
        linear_probe(encoder, letters, **({"budget": "50 examples"} | settings))


def test_a_bad_task_is_named(encoder, letters):
    lines = Dataset.from_dict({"text": ["a", "b"]})
    with pytest.raises(InputError, match="it has no head to fit"):
        linear_probe(
            small("causal-lm", "nano"), Task("l", "language-modelling", {"train": lines}, ("text",), None), "2 steps"
        )
    bare = Task("bare", "text-classification", {"test": letters.rows("test")}, ("text",), "label")
    with pytest.raises(InputError, match="unknown split of task 'bare' 'train'"):
        linear_probe(encoder, bare, "10 examples")
    with pytest.raises(InputError, match="cannot do the text-classification task"):
        linear_probe(small("vit", "nano"), letters, "10 examples")
    mlp_rows = Dataset.from_dict({"x": [0.0, 1.0], "y": [0, 1]})
    table = Task("t", "tabular-classification", {"train": mlp_rows}, ("x",), "y")
    with pytest.raises(InputError, match="counts no tokens"):
        linear_probe(small("mlp", "nano"), table, "10 tokens")


@pytest.mark.assets
def test_a_real_encoder_beats_chance_by_far_on_200_rows(asset, score):
    asset("all-MiniLM-L6-v2")
    asset("20newsgroups")
    from downriver import models, tasks

    model = models.load("all-MiniLM-L6-v2", max_length=32)
    task = tasks.load("20newsgroups").sample("test", 200, seed=0)
    probed = linear_probe(model, task, "200 examples")
    accuracy, loss = score(probed, task)
    assert accuracy > 0.35  # chance is 0.05
    assert loss < np.log(20) - 0.5
    assert probed.head.weight.abs().max() < 1e3  # one of its features is dead
