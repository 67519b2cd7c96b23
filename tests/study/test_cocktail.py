"""Cocktails: designs, gains, effects that were planted, choice on validation alone, resumption, refusals."""

import itertools
import math

import numpy as np
import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.core.seeds import generator
from downriver.study import Ledger
from downriver.study.cocktail import CocktailDesign, cocktail_report, cocktail_study, recommend

WORTH = {"t": 0.5, "a": 0.10, "b": -0.05, "c": 0.02, "general": 0.01}


def additive(mixture, pair=0.0):
    return sum(WORTH.get(name, 0.0) for name in mixture) + pair * ({"a", "b"} <= set(mixture))


def run(design, folder, score=additive, steps=lambda mixture: 100, noise=0.0, **options):
    def train(mixture, seed, **setting):
        return (mixture, seed, setting), steps(mixture)

    def evaluate(model, task, split):
        mixture, seed, setting = model
        luck = noise * generator(mixture, seed, split, setting).normal()
        return {"accuracy": score(mixture) + seed / 100 + luck, "format": 0.9}

    study = cocktail_study(design, train, evaluate, **options)
    return study.run(folder, executor="serial", progress=False)


def design(kind="full", **settings):
    return CocktailDesign(("t", "a", "b", "c"), target="t", regularizers=("general",), design=kind, **settings)


def test_designs():
    _t, *_others = WORTH
    full = design("full").mixtures
    assert len(full) == 16 and all("t" in mixture for mixture in full.values()) and next(iter(full)) == "t"
    assert set(design("incremental").mixtures) == {
        "t", "t + general", "t + a", "t + a + general", "t + a + b", "t + a + b + general", "t + a + b + c",
        "t + a + b + c + general",
    }  # fmt: skip
    left = design("leave_one_out").mixtures
    assert [len(m) for m in left.values()] == [1, 5, 4, 4, 4, 4]
    named = CocktailDesign(("t", "a", "b", "c"), target="t", helpers=("b",), regularizers={"general": object()})
    assert list(named.mixtures) == ["t", "t + general", "t + b", "t + b + general"]
    each = CocktailDesign(("x", "y"), design="full")
    assert list(each.mixtures) == ["x", "y", "x + y"] and each.targets == ("x", "y")


@pytest.mark.parametrize(
    ("k", "most", "runs"), [(2, 64, 4), (3, 64, 8), (4, 64, 8), (7, 64, 16), (7, 8, 8), (15, 31, 16)]
)
def test_a_fractional_design_holds_each_ingredient_and_each_pair_equally_often(k, most, runs):
    names = [f"h{i}" for i in range(k)]
    mixtures = CocktailDesign(("t", *names), target="t", design="fractional", max_runs=most).mixtures.values()
    X = np.array([[name in m for name in names] for m in mixtures]).astype(int)
    assert len(X) == runs and (X.sum(axis=0) == runs / 2).all()
    pairs = [(X[:, i] * X[:, j]).sum() for i, j in itertools.combinations(range(k), 2)]
    assert set(pairs) == {runs / 4}
    if k <= runs / 2:  # resolution IV: an effect is clear of every pair
        for i in range(k):
            for j, l in itertools.combinations(set(range(k)) - {i}, 2):
                signs = 1 - 2 * X
                assert (signs[:, i] * signs[:, j] * signs[:, l]).sum() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "z"}, "unknown target 'z'"),
        ({"target": "t", "helpers": ("q",)}, "unknown helper 'q'"),
        ({"target": "t", "helpers": ("t",)}, "unknown helper 't'"),
        ({"target": "t", "design": "half"}, "unknown design 'half'"),
        ({"target": "t", "budget": "tokens"}, "unknown budget 'tokens'"),
        ({"target": "t", "seeds": 0}, "seeds is 0"),
        ({"target": "t", "regularizers": ("a",)}, "ingredient 'a' is named twice"),
        ({"target": "t", "regularizers": ("base",)}, "ingredient 'base'"),
        ({"target": "t", "design": [("a", "b")]}, r"the mixture a \+ b lacks the target 't': transfer=True"),
        ({"target": "t", "design": [("t", "q")]}, "unknown ingredient 'q'"),
        ({"target": "t", "design": "full", "max_runs": 3}, "4 mixtures and max_runs is 3"),
        ({"target": "t", "design": "fractional", "max_runs": 2}, "of 2 ingredients needs 4 mixtures"),
    ],
)
def test_bad_designs(settings, message):
    with pytest.raises(InputError, match=message):
        CocktailDesign(("t", "a", "b"), **settings)


def test_the_gain_of_the_single_task_is_nothing_and_others_are_differences(tmp_path):
    report = cocktail_report(run(design(), tmp_path, noise=0.02), design())
    alone = report.gains.filter(arm="t")
    assert alone["gain"].to_list() == alone["low"].to_list() == alone["high"].to_list() == [0.0, 0.0]
    exact = cocktail_report(run(design(), tmp_path / "exact"), design())
    for arm, mixture in design().mixtures.items():
        found = exact.gains.filter(arm=arm, split="test")["gain"].item()
        assert found == pytest.approx(additive(mixture) - 0.5)
    assert exact.chosen == "t + a + c + general" and set(exact.losing) == {
        arm for arm, m in design().mixtures.items() if additive(m) < 0.5 - 1e-9
    }
    assert exact.format_rate["rate"].to_list() == pytest.approx([0.9] * 16)


@pytest.mark.parametrize("kind", ["full", "leave_one_out", "fractional", "incremental"])
def test_planted_effects_are_recovered(kind, tmp_path):
    report = cocktail_report(run(design(kind), tmp_path), design(kind))
    found = dict(report.effects.select("term", "effect").iter_rows())
    for name in ("a", "b", "c", "general"):
        assert found[name] == pytest.approx(WORTH[name], abs=1e-9)
    assert all(value == pytest.approx(0, abs=1e-9) for term, value in found.items() if "×" in term)
    assert report.effects["r2"][0] > 0.99


def test_a_planted_pair_is_recovered_or_said_to_be_confounded(tmp_path):
    full = cocktail_report(run(design(), tmp_path, lambda m: additive(m, pair=0.3)), design())
    found = dict(full.effects.select("term", "effect").iter_rows())
    assert found["a × b"] == pytest.approx(0.3) and found["a"] == pytest.approx(0.1 + 0.3 / 2)
    assert full.effects["r2"][0] > 0.99 and full.confounded == ()
    half = cocktail_report(
        run(design("fractional"), tmp_path / "half", lambda m: additive(m, pair=0.3)), design("fractional")
    )
    assert "a × b" in half.confounded and "a × b" not in half.effects["term"].to_list()


def test_the_interval_of_an_effect_is_that_of_the_seeds(tmp_path):
    many = design(seeds=8)
    report = cocktail_report(run(many, tmp_path, noise=0.05), many)
    row = report.effects.filter(term="a").row(0, named=True)
    assert row["low"] < row["effect"] < row["high"] and row["effect"] == pytest.approx(0.1, abs=0.03)
    narrow = (
        cocktail_report(run(many, tmp_path, noise=0.05), many, level=0.5).effects.filter(term="a").row(0, named=True)
    )
    assert narrow["high"] - narrow["low"] < row["high"] - row["low"] and narrow["effect"] == row["effect"]


def test_the_choice_never_depends_on_test_rows(tmp_path):
    rows = run(design(), tmp_path, noise=0.02).rows()
    report = cocktail_report(rows, design())
    rng = np.random.default_rng(0)
    noise = pl.Series(rng.normal(size=len(rows)) * 10)
    spoilt = rows.with_columns(
        value=pl.when(pl.col("metric").str.starts_with("test")).then(noise).otherwise(pl.col("value"))
    )
    other = cocktail_report(spoilt, design())
    assert other.ranking == report.ranking and other.chosen == report.chosen
    assert other.chosen_gain != report.chosen_gain
    assert recommend(spoilt, design()) == recommend(rows, design())


def test_settings_are_chosen_on_validation_and_test_rows_are_read_once(tmp_path):
    read = []

    def train(mixture, seed, rate):
        return (mixture, seed, rate), 10

    def evaluate(model, task, split):
        read.append((split, model[2]))
        best = {"validation": 0.2, "test": 0.3}[split]
        return {"accuracy": 1 - abs(model[2] - best)}

    one = CocktailDesign(("t", "a"), target="t", seeds=1)
    study = cocktail_study(one, train, evaluate, settings=[{"rate": r} for r in (0.1, 0.2, 0.3)])
    result = study.run(tmp_path, executor="serial", progress=False)
    assert not result.failures
    assert [r for split, r in read if split == "test"] == [0.2, 0.2]  # one for the single task, one for the pair
    assert [r for split, r in read if split == "validation"] == [0.1, 0.2, 0.3] * 2
    with pytest.raises(InputError, match="settings is empty"):
        cocktail_study(one, train, evaluate, settings=[]).arms()


def test_probes_say_what_was_lost(tmp_path):
    def train(mixture, seed):
        return mixture, 10 if mixture else 0

    def evaluate(model, task, split):
        return {"accuracy": 0.8 - 0.1 * len(model) + (0.25 if "general" in model else 0)}

    study = cocktail_study(design("incremental"), train, evaluate, probes=["knowledge"])
    report = cocktail_report(study.run(tmp_path, executor="serial", progress=False), design("incremental"))
    lost = dict(report.degradation.select("arm", "change").iter_rows())
    assert lost["t"] == pytest.approx(-0.1) and lost["t + general"] == pytest.approx(0.05)
    assert "knowledge after t:" in report.text and "base" not in report.gains["arm"].to_list()


def test_unequal_steps_are_refused_unless_the_budget_says_so(tmp_path):
    uneven = run(design(), tmp_path, steps=lambda mixture: 100 * len(mixture))
    with pytest.raises(InputError, match=r"'t' was trained for 100 steps and 't \+ a' for 200.*budget='examples'"):
        cocktail_report(uneven, design())
    report = cocktail_report(uneven, design(budget="examples"))
    assert report.steps["t"] == 100 and report.steps["t + a"] == 200
    rows = uneven.rows().filter(pl.col("metric") != "steps")
    with pytest.raises(InputError, match="arm 't' does not say how many steps"):
        cocktail_report(rows, design())


def test_a_resumed_study_gives_the_same_table(tmp_path):
    whole = run(design(), tmp_path / "whole", noise=0.02)
    part = run(design(), tmp_path / "part", noise=0.02)
    keys = [cell.key for cell in part.cells if cell.arm in ("t", "t + a + b")]
    Ledger(tmp_path / "part").forget("cocktail", keys)
    assert (
        run(design(), tmp_path / "part", noise=0.02)
        .rows()
        .drop("seconds", "peak_memory", "cell")
        .equals(whole.rows().drop("seconds", "peak_memory", "cell"))
    )


def test_few_seeds_are_said_to_be_few(tmp_path):
    one = design(seeds=1)
    report = cocktail_report(run(one, tmp_path), one)
    assert "no interval: one seed" in report.text and math.isinf(report.chosen_gain.low)
    two = design(seeds=2)
    assert "3 seeds at least are needed" in cocktail_report(run(two, tmp_path / "2", noise=0.02), two).text


def test_every_task_may_be_the_target(tmp_path):
    each = CocktailDesign(("t", "a", "b"), design="full")
    result = run(each, tmp_path)
    report = cocktail_report(result, each, target="a")
    assert report.gains.filter(arm="a + b", split="test").is_empty() == ("a + b" not in each.mixtures)
    assert set(report.ranking) == {arm for arm, mixture in each.mixtures.items() if "a" in mixture}
    assert report.gains.filter(arm="t + b")["transfer"].all()  # trained without it
    with pytest.raises(InputError, match="no target of its own: name one of t, a, b"):
        cocktail_report(result, each)
    with pytest.raises(InputError, match="unknown target 'x'"):
        cocktail_report(result, each, target="x")


def test_a_transfer_arm_is_reported_and_never_chosen(tmp_path):
    own = CocktailDesign(("t", "a"), target="t", design=[("t", "a"), ("a",)], transfer=True)
    report = cocktail_report(run(own, tmp_path, lambda m: 2.0 if m == ("a",) else additive(m)), own)
    assert report.chosen == "t + a" and report.gains.filter(arm="a", split="test")["gain"].item() == pytest.approx(1.5)


def test_recommend_finds_a_mixture_that_was_not_run(tmp_path):
    run_some = [m for m in design().mixtures.values() if m != ("t", "a", "c") and len(m) < 5]
    own = design(run_some)
    result = run(own, tmp_path)
    found = recommend(result, own, k=2)
    assert found.mixture == ("t", "a", "c") and not found.measured
    assert found.predicted == pytest.approx(0.12, abs=3 * max(found.error, 0.005)) and found.error < 0.03
    assert recommend(result, own, k=1).mixture == ("t", "a") and recommend(result, own, k=1).measured
    assert recommend(result, own, k=2, kind="linear").kind == "linear"
    with pytest.raises(InputError, match="k is 0"):
        recommend(result, own, k=0)
    few = CocktailDesign(("t", "a"), target="t")
    with pytest.raises(InputError, match="2 mixtures hold 't': four at least"):
        recommend(run(few, tmp_path / "few"), few)


def test_nothing_measured(tmp_path):
    empty = cocktail_study(design(), lambda m, s: (m, 1), lambda *_: {"accuracy": 1.0}).result(tmp_path)
    with pytest.raises(InputError, match="no row measures 't' on validation"):
        cocktail_report(empty, design())
