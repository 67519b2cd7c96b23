"""The bound's exact form, the labels it saves, and that simulation and real data show when pretraining pays."""

import math

import numpy as np
import polars as pl
import pytest
from sklearn.datasets import load_wine
from sklearn.linear_model import LinearRegression

from downriver.core import InputError
from downriver.pretrain import FactorPretrainer, MixturePretrainer, advantage_study, bound, labels_saved
from downriver.pretrain.pretraining_advantage import Advantage, data_source, factor_source

KINDS = [("factor", {"d": 60, "r": 3}), ("mixture", {"d": 20, "K": 4}), ("contrastive", {"d": 60, "r": 8})]


@pytest.mark.parametrize(("kind", "sizes"), KINDS)
def test_terms_fall_with_roots_of_m_and_n(kind, sizes):
    one = bound(kind, m=1000, n=50, **sizes)
    more = bound(kind, m=4000, n=50, **sizes)
    labels = bound(kind, m=1000, n=450, **sizes)
    assert more["pretraining"] == pytest.approx(one["pretraining"] / 2) and more["labelled"] == one["labelled"]
    assert labels["labelled"] == pytest.approx(one["labelled"] / 3)
    assert labels["supervised"] == pytest.approx(one["supervised"] / 3)
    assert one["two_phase"] == one["pretraining"] + one["labelled"]
    assert bound(kind, m=1000, n=50, kappa=3, **sizes)["pretraining"] == pytest.approx(3 * one["pretraining"])
    assert one["note"] == "up to constants"


def test_the_capacities_are_those_of_the_paper():
    delta = math.exp(-1e-12)  # no confidence, no logarithm
    factor = bound("factor", d=60, r=3, m=100, n=10, delta=delta)
    expected = math.sqrt(180 / 100), math.sqrt(3 / 10), math.sqrt(60 / 10)
    assert [factor[k] for k in ("pretraining", "labelled", "supervised")] == pytest.approx(expected)
    mixture = bound("mixture", d=60, K=5, m=100, n=10, delta=delta)
    assert mixture["pretraining"] == pytest.approx(math.sqrt(3)) and mixture["labelled"] == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(("kind", "sizes"), KINDS)
@pytest.mark.parametrize("m", [50, 5000, 10**6])
def test_the_crossover_is_where_the_bounds_meet(kind, sizes, m):
    n = labels_saved(kind, m=m, n=10, kappa=1.5, **sizes).crossover
    at = bound(kind, m=m, n=n, kappa=1.5, **sizes)
    assert at["two_phase"] == pytest.approx(at["supervised"])
    for factor, better in ((0.5, True), (2, False)):
        terms = bound(kind, m=m, n=n * factor, kappa=1.5, **sizes)
        assert (terms["two_phase"] < terms["supervised"]) is better
        assert (labels_saved(kind, m=m, n=n * factor, kappa=1.5, **sizes).saved > 0) is better


def test_the_labels_needed_have_the_same_bound():
    saving = labels_saved("factor", d=60, r=3, m=20_000, n=20)
    two = bound("factor", d=60, r=3, m=20_000, n=20)["two_phase"]
    assert bound("factor", d=60, r=3, m=1, n=saving.supervised_labels)["supervised"] == pytest.approx(two)
    assert saving.saved == saving.supervised_labels - 20 and saving.note == "up to constants"


@pytest.fixture(scope="module")
def measured():
    return advantage_study(
        factor_source(30, 2, test=1000), FactorPretrainer(2), m_grid=[60, 3000], n_grid=[10, 40, 160], seeds=8
    )


def test_pretraining_beats_tuned_ridge_on_data_of_the_model(measured):
    medians = {(r["method"], r["m"], r["n"]): r["risk"] for r in measured.medians().iter_rows(named=True)}
    assert len(measured.table) == 8 * 3 * (1 + 2 + 1)
    for n in (10, 40, 160):
        assert medians["two-phase", 3000, n] < 0.7 * medians["supervised", 0, n]
        assert medians["oracle", 0, n] <= medians["two-phase", 3000, n] * 1.05
    assert medians["two-phase", 3000, 160] < medians["two-phase", 60, 160]
    assert measured.crossover(3000) == math.inf
    assert measured.labels_saved(3000, 10) > 20


def test_a_study_repeats_and_each_seed_draws_anew(measured):
    again = advantage_study(
        factor_source(30, 2, test=1000), FactorPretrainer(2), m_grid=[60, 3000], n_grid=[10, 40, 160], seeds=2
    )
    assert again.table.equals(measured.table.filter(pl.col("seed") < 2))
    assert measured.table.filter(method="supervised", n=10)["risk"].n_unique() == 8


def test_a_target_off_the_factors_makes_pretraining_lose():
    found = advantage_study(
        factor_source(30, 2, low_variance=True, test=500), FactorPretrainer(2), m_grid=[3000], n_grid=[40, 160], seeds=5
    )
    assert found.crossover(3000) < 160
    assert found.labels_saved(3000, 160) < 0


def test_crossover_and_saving_are_read_off_the_curves():
    rows = [("two-phase", 100, n, r) for n, r in ((10, 1.0), (100, 0.8), (1000, 0.7))]
    rows += [("supervised", 0, n, r) for n, r in ((10, 2.0), (100, 1.0), (1000, 0.5))]
    table = pl.DataFrame([{"method": a, "m": m, "n": n, "seed": 0, "risk": r} for a, m, n, r in rows])
    found = Advantage(table)
    assert found.crossover(100) == pytest.approx(100 * 10**0.5)
    assert found.labels_saved(100, 10) == pytest.approx(90)
    assert found.labels_saved(100, 1000) == pytest.approx(100 * 10**0.6 - 1000)
    table = table.with_columns(risk=pl.when(pl.col("method") == "two-phase").then(pl.lit(0.1)).otherwise("risk"))
    assert Advantage(table).labels_saved(100, 10) == math.inf
    with pytest.raises(InputError, match="n = 20 is not on the grid: one of 10, 100, 1000"):
        found.labels_saved(100, 20)
    with pytest.raises(InputError, match="m = 7 is not on the grid: one of 100"):
        found.crossover(7)


def test_real_rows_are_split_and_classes_take_turns():
    x, y = load_wine(return_X_y=True)
    source = data_source(x, y)
    draw = source(np.random.default_rng(0), 80, 12)
    assert np.bincount(draw.targets).tolist() == [4, 4, 4] and draw.unlabelled.shape == (80, 13)
    np.testing.assert_allclose(draw.unlabelled.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(draw.unlabelled.std(axis=0), 1)
    found = advantage_study(source, MixturePretrainer(3, "spherical"), m_grid=[80], n_grid=[6, 12], seeds=3)
    risks = found.table["risk"]
    assert risks.is_between(0, 1).all() and found.table.filter(method="two-phase", n=6)["risk"].mean() < 0.3
    with pytest.raises(InputError, match="unlabelled rows are asked for"):
        source(np.random.default_rng(0), 500, 12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bound("factors", d=3, r=1, m=1, n=1), "did you mean 'factor'"),
        (lambda: bound("factor", d=3, m=1, n=1), "a factor model needs r"),
        (lambda: bound("mixture", d=3, r=2, m=1, n=1), "a mixture model needs K"),
        (lambda: bound("factor", d=3, r=4, m=1, n=1), "at most d = 3"),
        (lambda: bound("factor", d=3, r=1, m=0, n=1), "m is 0"),
        (lambda: bound("factor", d=3, r=1, m=1, n=1, delta=1.0), "delta is 1.0"),
        (lambda: labels_saved("factor", d=3, r=1, m=1, n=1, kappa=-1), "kappa is -1"),
        (lambda: data_source(np.ones((4, 2)), [1, 1, 1, 1]), "one class only"),
        (lambda: data_source(np.ones((4, 2)), [1, 0]), "and 2 labels"),
        (lambda: advantage_study(factor_source(), FactorPretrainer(3), m_grid=[], n_grid=[1]), "m_grid, n_grid"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_heads_and_rivals_can_be_chosen():
    found = advantage_study(
        factor_source(10, 1, test=200), FactorPretrainer(1), m_grid=[200], n_grid=[12], seeds=3,
        supervised=LinearRegression(), head=LinearRegression(fit_intercept=False),
    )  # fmt: skip
    ridge = advantage_study(factor_source(10, 1, test=200), FactorPretrainer(1), m_grid=[200], n_grid=[12], seeds=3)
    assert found.table.filter(method="supervised")["risk"].sum() > ridge.table.filter(method="supervised")["risk"].sum()
