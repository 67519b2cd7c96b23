"""The textbook regression in logarithms against scipy and closed formulas; fronts and gaps."""

import numpy as np
import pytest
from scipy import stats

from downriver.core.errors import InputError
from downriver.forecast.pareto import LogLinearLaw, ParetoPowerLaw, front, generalization_gap
from downriver.tasks.cells import CellGrid

RNG = np.random.default_rng(0)
C = np.geomspace(1e3, 1e6, 9)
Y = 10 ** (1.86 - 0.15 * np.log10(C) + 0.02 * RNG.standard_normal(9))


def test_one_factor_is_linregress():
    law, reference = LogLinearLaw(["compute"]).fit(C, Y), stats.linregress(np.log10(C), np.log10(Y))
    assert law.params_["compute"] == pytest.approx(reference.slope, abs=1e-8)
    assert law.params_["intercept"] == pytest.approx(reference.intercept, abs=1e-8)
    assert law.stderr_["compute"] == pytest.approx(reference.stderr, abs=1e-8)
    assert law.stderr_["intercept"] == pytest.approx(reference.intercept_stderr, abs=1e-8)
    assert law.p_values_["compute"] == pytest.approx(reference.pvalue, rel=1e-8)
    assert law.r2_ == pytest.approx(reference.rvalue**2, abs=1e-8)
    t = stats.t.ppf(0.975, 7)
    assert law.ci()["compute"] == pytest.approx(
        (reference.slope - t * reference.stderr, reference.slope + t * reference.stderr)
    )


@pytest.mark.parametrize("band", ["confidence", "prediction"])
def test_bands_are_the_textbook_ones(band):
    law, x = LogLinearLaw(["compute"]).fit(C, Y), np.array([500.0, 2e4, 1e7])
    X = np.log10(C)
    s = np.sqrt((law.residuals_**2).sum() / 7)
    leverage = 1 / 9 + (np.log10(x) - X.mean()) ** 2 / ((X - X.mean()) ** 2).sum()
    half = stats.t.ppf(0.95, 7) * s * np.sqrt(leverage + (band == "prediction"))
    low, high = law.interval(x, level=0.9, band=band)
    np.testing.assert_allclose(np.log10(low), np.log10(law.predict(x)) - half, atol=1e-8)
    np.testing.assert_allclose(np.log10(high), np.log10(law.predict(x)) + half, atol=1e-8)


def test_two_factors_are_the_normal_equations():
    N, S = np.tile(np.geomspace(4e8, 1e10, 4), 4), np.repeat([5e5, 2e6, 5e6, 1e7], 4)
    y = 10 ** (2.3 - 0.16 * np.log10(N) - 0.04 * np.log10(S) + 0.01 * RNG.standard_normal(16))
    law = LogLinearLaw(["params", "samples"]).fit(N, S, y)
    A = np.column_stack([np.ones(16), np.log10(N), np.log10(S)])
    beta = np.linalg.solve(A.T @ A, A.T @ np.log10(y))
    variance = ((np.log10(y) - A @ beta) ** 2).sum() / 13
    error = np.sqrt(np.diag(np.linalg.inv(A.T @ A)) * variance)
    np.testing.assert_allclose(list(law.params_.values()), beta, atol=1e-8)
    np.testing.assert_allclose(list(law.stderr_.values()), error, atol=1e-8)
    np.testing.assert_allclose(list(law.p_values_.values()), 2 * stats.t.sf(np.abs(beta / error), 13), rtol=1e-6)
    assert law.predict(3e10, 1e7) == pytest.approx(10 ** (beta @ [1, np.log10(3e10), 7]))
    assert "params" in law.report()


def test_audit_is_what_refitting_gives():
    law = LogLinearLaw(["compute"]).fit(C, Y)
    keep = np.arange(9) != 4
    without = LogLinearLaw(["compute"]).fit(C[keep], Y[keep])
    assert law.audit()[4] == pytest.approx(without.predict(C[4]) / Y[4] - 1, rel=1e-8)


def test_no_kept_run_is_beaten_and_a_beaten_run_changes_nothing():
    cost, loss = RNG.uniform(1, 100, 200), RNG.uniform(1, 5, 200)
    kept = front(cost, loss)
    for i in np.flatnonzero(kept):
        assert not ((cost <= cost[i]) & (loss < loss[i])).any() and not ((cost < cost[i]) & (loss <= loss[i])).any()
    for i in np.flatnonzero(~kept):
        assert ((cost <= cost[i]) & (loss <= loss[i]) & kept).any()
    law = ParetoPowerLaw().fit(C, Y)
    worse = ParetoPowerLaw().fit(np.append(C, C[3] * 1.1), np.append(Y, Y[0] * 2))
    assert worse.params_ == law.params_ and not worse.front_[-1]


def test_ties_keep_the_cheaper_and_the_first():
    assert front(np.array([2.0, 1.0, 1.0]), np.array([3.0, 3.0, 3.0])).tolist() == [False, True, False]


def test_compute_for_is_the_inverse():
    law = ParetoPowerLaw().fit(C, Y)
    np.testing.assert_allclose(law.compute_for(law.predict(C)), C, rtol=1e-9)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([1, 2, 3], [3, 4, 5]), "1 of 3 runs are on the front"),
        (([1, 2, -3], [5, 4, 3]), "compute: entry 2"),
        (([1, 2, 3],), "compute and loss are expected"),
    ],
)
def test_bad_fronts_are_refused(columns, message):
    with pytest.raises(InputError, match=message):
        ParetoPowerLaw().fit(*columns)


def test_factors_that_move_together_are_refused():
    with pytest.raises(InputError, match="apart"):
        LogLinearLaw(["a", "b"]).fit(C, C**2, Y)
    with pytest.raises(InputError, match="apart"):
        LogLinearLaw(["a"]).fit(np.full(9, 3.0), Y)
    with pytest.raises(InputError, match="at least 3 runs"):
        LogLinearLaw(["a"]).fit([1, 2], [1, 2])
    with pytest.raises(InputError, match="did you mean 'prediction'"):
        LogLinearLaw(["a"]).fit(C, Y).interval(C, band="predict")


def test_gap_is_the_ratio_of_the_paper_s_lines():
    grid = CellGrid(
        ["caption", "translate"], ["de", "es", "zh"], {("caption", "de"), ("translate", "es"), ("translate", "zh")}
    )
    unseen = 10**1.86 * C**-0.15
    rows = {
        "compute": np.tile(C, 3),
        "task": ["caption"] * 27,
        "language": ["de"] * 9 + ["es"] * 9 + ["zh"] * 9,
        "loss": np.concatenate([10**1.42 * C**-0.15, unseen * 0.9, unseen * 1.1]),
    }
    (gap,) = generalization_gap(rows, grid)
    assert (gap.task, gap.compute) == ("caption", C[-1])
    assert gap.ratio == pytest.approx(10**0.44) and gap.multiplier == pytest.approx(10 ** (0.44 / 0.15))
    rows["loss"][9:] = np.tile(np.geomspace(9, 10, 9), 2)
    with pytest.raises(InputError, match="front"):
        generalization_gap(rows, grid)


def test_gap_needs_every_cell_of_every_run_and_both_kinds():
    grid = CellGrid(["caption"], ["de", "es", "zh"], {("caption", "de")})
    rows = {"compute": [1, 2, 3] * 2 + [1, 2], "task": ["caption"] * 8, "loss": [3, 2, 1] * 2 + [3, 2]}
    with pytest.raises(InputError, match="compute 3 has another number of cells"):
        generalization_gap(rows | {"language": ["de"] * 3 + ["es"] * 3 + ["zh"] * 2}, grid)
    with pytest.raises(InputError, match="language of the grid 'fr'"):
        generalization_gap(rows | {"language": ["fr"] * 8}, grid)
    few = {name: values[:3] for name, values in rows.items()}
    with pytest.raises(InputError, match="seen and on unseen"):
        generalization_gap(few | {"language": ["de"] * 3}, grid)
