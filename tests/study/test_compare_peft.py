"""The comparison of methods: what its measurements are, matched sizes, the best of them, its ledger, bad input."""

import functools
import math

import pytest
import torch
from datasets import Dataset

from downriver.adapt import advise, peft, read_ledger
from downriver.core import InputError
from downriver.evaluate import evaluate
from downriver.models import small
from downriver.study import compare_peft
from downriver.study.compare_peft import BEST, forgetting, kept
from downriver.tasks import Task

METHODS = ("full", "lora", "fish_mask")


def passages(seed):
    rows = Dataset.from_dict({"text": [f"the river {i} runs to the sea" for i in range(12)]})
    return Task("passages", "language-modelling", {"validation": rows}, ("text",), None)


def words(seed):
    rows = Dataset.from_dict({"text": ["aaaa", "zzzz", "aaa", "zzz"] * 4, "label": [0, 1, 0, 1] * 4})
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    return Task("words", "text-classification", splits, ("text",), "label", ("a", "z"), ("accuracy", "loss"))


base = functools.partial(small, "masked-lm", "nano")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    study = compare_peft(
        "words",
        base,
        words,
        METHODS,
        budget="32 examples",
        retained=passages,
        share=0.1,
        settings={"fish_mask": {"keep": 0.01, "samples": 8}},
        learning_rates={"full": [1e-3, 1e-2, 1e30]},
        head="random",
        batch_size=8,
        seeds=1,
    )
    folder = tmp_path_factory.mktemp("runs")
    found = study.run(folder, executor="serial", progress=False)
    assert not found.failures, found.failures
    return found


@pytest.fixture(scope="module")
def values(result):
    return {(row["arm"], row["metric"]): row["value"] for row in result.rows().to_dicts()}


def test_what_is_measured(values):
    total, head = sum(p.numel() for p in base(0).parameters()), 2 * 32 + 2
    assert {arm for arm, _ in values} == {*METHODS, BEST}
    assert values["full", "parameters"] == total
    assert values["fish_mask", "parameters"] == round(0.01 * total)  # the size in the settings, not the share
    assert 0.08 * total < values["lora", "parameters"] <= 0.1 * total
    for arm in METHODS:
        assert values[arm, "trained share"] == pytest.approx((values[arm, "parameters"] + head) / total)
        assert values[arm, "seconds"] > values[arm, "step seconds"] > 0 and values[arm, "memory"] > 0
    assert values["lora", "merge error"] < 1e-4 and ("full", "merge error") not in values
    assert values["full", "disk"] > 4 * total > 5 * values["lora", "disk"]
    assert values["fish_mask", "disk"] < 8 * 0.011 * total + 20_000  # an index and a value an entry, and names


def test_rates(values):
    assert values["full", "learning rate"] in (1e-3, 1e-2)
    assert math.isnan(values["full", "rate spread"])  # one of them diverged
    assert values["lora", "rate spread"] > 0
    # validation and test are the same rows here: the loss of the rate that was kept is the loss of the model
    assert values["lora", "validation loss"] == pytest.approx(values["lora", "loss"], abs=1e-5)


def test_the_best(values):
    best = min(("lora", "fish_mask"), key=lambda arm: values[arm, "validation loss"])
    for metric in ("accuracy", "loss", "forgetting", "parameters", "learning rate"):
        assert values[BEST, metric] == values[best, metric]


def test_the_ledger_is_advice(result, values):
    runs = read_ledger(result.rows(), "accuracy")
    assert dict(zip(runs["run"], runs["parameters"], strict=True))["lora"] == values["lora", "parameters"]
    assert runs["forgetting"].null_count() == runs["disk"].null_count() == 0
    found = advise(runs, objectives=("parameters", "forgetting"))
    assert "fish_mask" in found.chosen["run"].to_list()


def test_it_resumes(result):
    again = result.study.run(result.ledger.root, executor="serial", progress=False)
    assert again.rows().equals(result.rows(), null_equal=True)
    other = compare_peft("words", base, words, METHODS, budget="32 examples", share=0.2)
    assert {cell.key for cell in other.cells(1)}.isdisjoint(cell.key for cell in result.cells)


def test_forgetting_counts_what_is_lost():
    before, after = base(0), base(0)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    [loss] = forgetting(before, after, passages)
    texts = [evaluate(model, passages(0), split="validation", metrics=["loss"])[0].value for model in (before, after)]
    assert loss.value == pytest.approx(texts[1] - texts[0]) and loss.direction == "lower"
    assert forgetting(before, before, passages)[0].value == 0


def test_forgetting_of_a_score():
    """Retrieval by an encoder, which is better when higher: what is lost counts as well."""
    texts = [f"{w} " * 20 for w in ("river", "mountain", "sea", "cloud")]
    task = Task("texts", "language-modelling", {"test": Dataset.from_dict({"text": texts})}, ("text",), None)
    before, after = small("text-encoder", "nano"), small("text-encoder", "nano")
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.zero_()  # says the same of every text
    [row] = forgetting(before, after, task)
    assert row.value > 0.3 and row.direction == "lower"


def test_what_is_kept_makes_the_model_again():
    plain, task = small("text-encoder", "nano"), words(0)
    how = {"learning_rates": [1e-2], "batch_size": 8, "head": "random"}
    full = peft(plain, task, "16 examples", tuner="full", **how)
    assert kept("full", plain, full).keys() == {
        *dict(plain.backbone.named_parameters()),
        "head.weight",
        "head.bias",
    }
    sparse = peft(plain, task, "16 examples", tuner="fish_mask", settings={"keep": 0.01, "samples": 8}, **how)
    stored = kept("fish_mask", plain, sparse)
    for name, weight in plain.backbone.named_parameters():
        rebuilt = weight.detach().clone().reshape(-1)
        rebuilt[stored[f"{name}.indices"].long()] = stored[f"{name}.values"]
        assert torch.equal(rebuilt, sparse.backbone.get_parameter(name).detach().reshape(-1))
    biases = peft(plain, task, "16 examples", tuner="bitfit", **how)
    names = kept("bitfit", plain, biases).keys() - {"head.weight"}
    assert names and all(name.endswith("bias") for name in names)


def test_bad_input():
    with pytest.raises(InputError, match="unknown PEFT method 'lorra'"):
        compare_peft("x", base, words, ["lorra"], budget="8 examples")
    with pytest.raises(InputError, match="learning_rates of lora: at least two"):
        compare_peft("x", base, words, ["lora"], budget="8 examples", learning_rates={"lora": [1e-3]})
    with pytest.raises(InputError, match="share is 2"):
        compare_peft("x", base, words, ["lora"], budget="8 examples", share=2)
    with pytest.raises(InputError, match="unknown PEFT method 'ia4'"):
        compare_peft("x", base, words, ["lora"], budget="8 examples", settings={"ia4": {}})
