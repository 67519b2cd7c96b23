"""Ingredients told in words: equal steps, shares, format beside accuracy, and no test row among the training rows."""

import dataclasses

import pytest

from downriver.core.errors import InputError
from downriver.models import small_language_model, word_tokenizer
from downriver.study.cocktail import CocktailDesign, cocktail_report, cocktail_study
from downriver.study.ingredients import Ingredient, instruction_cocktail
from downriver.tasks.generalization import InstructionTask, Template

SETTINGS = {"lora": None, "block": 24, "batch_size": 2, "warmup": 1, "dropout": 0.0, "learning_rate": 1e-2}


def task(name, numbers, template="{x} follows"):
    return InstructionTask(
        name, "c", "b", [{"x": f"{name}{i}", "y": f"w{i % 4}"} for i in numbers], (Template(template, "{y}"),)
    )


@pytest.fixture(scope="module")
def model():
    words = ["follows", *(f"{name}{i}" for name in "wth" for i in range(40))]
    return small_language_model("causal-lm", word_tokenizer(words, context=24), width=32, heads=2, context=24)


@pytest.fixture
def ingredients():
    return {
        "t": Ingredient(task("t", range(8)), task("t", range(8, 14)), task("t", range(14, 20))),
        "h": Ingredient(task("h", range(24))),
        "text": Ingredient(task("w", range(9), "{x} {y} follows")),
        "probe": Ingredient(task("h", range(3)), test=task("h", range(24, 30))),
    }


DESIGN = CocktailDesign(("t", "h"), target="t", regularizers=("text",), design="incremental", seeds=1)


def test_from_ingredients_to_a_report(model, ingredients, tmp_path):
    train, evaluate = instruction_cocktail(DESIGN, ingredients, model, "4 steps", extra={"text": 0.1}, **SETTINGS)
    study = cocktail_study(DESIGN, train, evaluate, probes=["probe"])
    result = study.run(tmp_path, executor="serial", progress=False)
    assert not result.failures
    report = cocktail_report(result, DESIGN)
    assert report.metric == "exact_match" and set(report.steps.values()) == {4}
    assert report.format_rate.height == 4 and report.degradation["probe"].unique().to_list() == ["probe"]
    rows = result.rows()
    assert set(rows.filter(metric="steps")["value"]) == {0.0, 4.0}  # none for the model as it was
    assert rows.filter(metric="validation exact_match", task="t").height == 5


def test_a_budget_of_examples_grows_with_the_mixture(model, ingredients):
    free = dataclasses.replace(DESIGN, budget="examples")
    train, _ = instruction_cocktail(free, ingredients, lambda seed: model, "2 steps", cap=16, **SETTINGS)
    assert [train(mixture, 0)[1] for mixture in (("t",), ("t", "h"))] == [2, 6]  # 8 examples; 8 and 16 of 24
    assert train((), 0) == (model, 0)


def test_the_form_of_an_answer_is_told_from_its_truth(model, ingredients):
    train, evaluate = instruction_cocktail(
        DESIGN, ingredients, model, "100 steps", **SETTINGS | {"learning_rate": 2e-2}
    )
    learnt = evaluate(train(("t",), 0)[0], "t", "test")
    assert learnt["format"] > 0.9 > evaluate(model, "t", "test")["format"]
    assert list(learnt) == ["exact_match", "format"] and learnt["exact_match"] <= learnt["format"]


def test_overlap_and_missing_rows_are_refused(model, ingredients):
    leaking = ingredients | {"h": Ingredient(task("t", range(18, 40)))}
    with pytest.raises(
        InputError, match=r"2 of 6 test rows of 't' share 13 words with training rows of 'h'.*row 4 first"
    ):
        instruction_cocktail(DESIGN, leaking, model, "4 steps")
    instruction_cocktail(DESIGN, leaking, model, "4 steps", overlap=0.4)
    with pytest.raises(InputError, match="target 't' has no test rows"):
        instruction_cocktail(
            DESIGN,
            ingredients | {"t": ingredients["h"]} | {"t": dataclasses.replace(ingredients["t"], test=None)},
            model,
            "4 steps",
        )
    with pytest.raises(InputError, match="unknown ingredient 'text'"):
        instruction_cocktail(DESIGN, {k: v for k, v in ingredients.items() if k != "text"}, model, "4 steps")
    with pytest.raises(InputError, match="unknown regularizer in extra 'h'"):
        instruction_cocktail(DESIGN, ingredients, model, "4 steps", extra={"h": 0.5})
    _, evaluate = instruction_cocktail(DESIGN, ingredients, model, "4 steps")
    with pytest.raises(InputError, match="'probe' has no validation rows"):
        evaluate(model, "probe", "validation")
