"""The solver: agreement with scipy, robustness, batches, intervals, audits, and what it refuses."""

import numpy as np
import pytest
from scipy.optimize import curve_fit, minimize

from downriver.core.errors import InputError
from downriver.forecast.fit import aligned, column, fit_law, fit_laws, solve
from downriver.forecast.forms import Chinchilla, ExpOfLoss, PowerLaw, TiedChinchilla

N = np.repeat([1e7, 8e7, 1.5e8, 4e8], 6)
D = N * np.tile([20, 40, 80, 160, 320, 640], 4)
TRUE = {"E": 1.84, "A": 166.0, "B": 287.0, "alpha": 0.273}
LOSS = 1.84 + 166 * N**-0.273 + 287 * D**-0.273


def noisy(draws: int, scale: float = 0.005) -> np.ndarray:
    return LOSS * (1 + scale * np.random.default_rng(1).standard_normal((draws, len(N))))


def test_noise_free_parameters_come_back():
    for objective in ("lsq", "huber_log"):
        found = fit_law(TiedChinchilla(), [N, D], LOSS, objective=objective)
        assert found.params == pytest.approx(TRUE, rel=1e-6)
        assert found.identifiable and found.converged and not found.notes
    untied = fit_law(Chinchilla(), [N, D], 1.7 + 400 * N**-0.34 + 2000 * D**-0.37).params
    assert untied == pytest.approx({"E": 1.7, "A": 400, "B": 2000, "alpha": 0.34, "beta": 0.37}, rel=1e-6)


def test_same_optimum_as_curve_fit_from_the_truth():
    for y in noisy(5):
        found = fit_law(TiedChinchilla(), [N, D], y)
        best, _ = curve_fit(
            lambda x, E, A, B, alpha: E + A * x[0] ** -alpha + B * x[1] ** -alpha,
            (N, D),
            y,
            p0=list(TRUE.values()),
            x_scale=list(TRUE.values()),
            ftol=1e-14,
            xtol=1e-14,
            gtol=1e-14,
            method="trf",
        )
        assert list(found.params.values()) == pytest.approx(list(best), rel=1e-5)
        np.testing.assert_allclose(
            found.predict(1.4e9, 9e11), best[0] + best[1] * 1.4e9 ** -best[3] + best[2] * 9e11 ** -best[3], rtol=1e-6
        )


def test_huber_reaches_the_optimum_that_a_long_simplex_search_reaches():
    rng = np.random.default_rng(2)
    y = noisy(1)[0] * np.where(rng.random(len(N)) < 0.15, 1.3, 1.0)
    found = fit_law(TiedChinchilla(), [N, D], y, objective="huber_log")

    def objective(p):
        E, a, b, alpha = p
        value = E + np.exp(a - alpha * np.log(N / 1e8)) + np.exp(b - alpha * np.log(D / 1e10))
        r = np.abs(np.log(np.maximum(value, 1e-9) / y))
        return np.where(r <= 1e-3, r * r, 1e-3 * (2 * r - 1e-3)).sum()

    p = np.array([1.84, np.log(166) - 0.273 * np.log(1e8), np.log(287) - 0.273 * np.log(1e10), 0.273])
    for _ in range(4):
        p = minimize(objective, p, method="Nelder-Mead", options={"xatol": 1e-12, "fatol": 1e-16, "maxfev": 5000}).x
    assert found.cost <= objective(p) * (1 + 1e-6)


def test_huber_ignores_outliers_that_pull_least_squares():
    y = LOSS.copy()
    y[[3, 10, 17]] *= 1.4
    robust = fit_law(TiedChinchilla(), [N, D], y, objective="huber_log")
    plain = fit_law(TiedChinchilla(), [N, D], y)
    truth = 1.84 + 166 * 6.9e9**-0.273 + 287 * 138e9**-0.273
    assert abs(robust.predict(6.9e9, 138e9) / truth - 1) < 1e-3 < abs(plain.predict(6.9e9, 138e9) / truth - 1)


def test_many_tasks_in_one_batch_are_the_same_as_one_by_one():
    Y = noisy(3)
    for together, y in zip(fit_laws(TiedChinchilla(), [N, D], Y), Y, strict=True):
        assert together.params == pytest.approx(fit_law(TiedChinchilla(), [N, D], y).params, rel=1e-7)


def test_units_do_not_matter():
    y = noisy(1)[0]
    one = fit_law(TiedChinchilla(), [N, D], y)
    other = fit_law(TiedChinchilla(), [N / 1e6, D / 1e9], y * 1000)
    np.testing.assert_allclose(other.predict(6.9e3, 138.0), 1000 * one.predict(6.9e9, 138e9), rtol=1e-7)


def test_weight_zero_is_the_same_as_leaving_out_and_weight_two_as_twice():
    y = noisy(1)[0]
    w = np.ones(len(N))
    w[5] = 0
    keep = np.arange(len(N)) != 5
    left_out = fit_law(TiedChinchilla(), [N[keep], D[keep]], y[keep]).params
    assert fit_law(TiedChinchilla(), [N, D], y, weight=w).params == pytest.approx(left_out, rel=1e-6)
    w[5] = 2
    twice = fit_law(TiedChinchilla(), [np.append(N, N[5]), np.append(D, D[5])], np.append(y, y[5])).params
    assert fit_law(TiedChinchilla(), [N, D], y, weight=w).params == pytest.approx(twice, rel=1e-6)


def test_bounds_hold_and_a_pinned_floor_is_said():
    n = np.geomspace(10, 1000, 8)
    found = fit_law(PowerLaw(), [n], 3 * n**-0.5 - 0.05)  # the best floor would be negative
    assert found.params["E"] == 0 and not found.identifiable
    assert found.notes == ["E is pinned at its bound: these points do not determine it"]
    assert found.spare == 6


def test_two_terms_that_cannot_be_told_apart_are_named():
    N_, D_ = np.geomspace(1e6, 1e9, 12), np.geomspace(1e6, 1e9, 12) * 20
    D_[0] *= 1 + 1e-6  # breaks the tie by a hair
    found = fit_law(TiedChinchilla(), [N_, D_], 2 + 100 * N_**-0.3 + 200 * D_**-0.3)
    assert not found.identifiable
    assert "A and B trade off" in found.notes[0] or "B and A trade off" in found.notes[0]


def test_intervals_hold_the_truth_at_their_level():
    """0.5 % noise, 100 draws: the 95 % bootstrap interval of every parameter holds the truth in at least 85."""
    fits = fit_laws(TiedChinchilla(), [N, D], noisy(100), n_starts=24)
    inside, hessian = np.zeros(4), np.zeros(4)
    for found in fits:
        values = found.form.natural(found.draws(200, n_starts=1).theta, found.units)
        low, high = np.quantile(values, [0.025, 0.975], axis=1)
        inside += (low <= list(TRUE.values())) & (list(TRUE.values()) <= high)
        bounds = found.ci(method="hessian")
        hessian += [bounds[k][0] <= v <= bounds[k][1] for k, v in TRUE.items()]
    assert inside.min() >= 85, inside
    assert hessian.min() >= 85, hessian
    assert min(inside.min(), hessian.min()) < 100  # an interval that never misses says nothing


def test_prediction_band_holds_a_new_run_even_with_one_spare_point():
    rng = np.random.default_rng(3)
    few = [0, 6, 12, 18, 4]  # five runs, four parameters
    new, target = 0, (1.4e9, 2.8e10)
    truth = 1.84 + 166 * target[0] ** -0.273 + 287 * target[1] ** -0.273
    fits = fit_laws(
        TiedChinchilla(), [N[few], D[few]], LOSS[few] * (1 + 0.005 * rng.standard_normal((40, 5))), n_starts=24
    )
    for found in fits:
        low, high = np.quantile(found.sample([target[0]], [target[1]], n=100), [0.05, 0.95])
        new += low <= truth * (1 + 0.005 * rng.standard_normal()) <= high
    assert new >= 32  # 90 % nominal: 36 of 40 expected


def test_case_resampling_and_residual_resampling_agree_on_many_points():
    found = fit_law(TiedChinchilla(), [N, D], noisy(1)[0])
    one, other = found.ci(0.9, "bootstrap", n=300), found.ci(0.9, "case", n=300)
    for name in TRUE:
        width = one[name][1] - one[name][0]
        assert 0.4 < (other[name][1] - other[name][0]) / width < 2.5


def test_draws_are_repeatable():
    y = noisy(1)[0]
    first, second = (fit_law(TiedChinchilla(), [N, D], y).ci(n=100) for _ in range(2))
    assert first == second


def test_no_spare_point_gives_no_interval_but_says_so():
    found = fit_law(PowerLaw(), [[100.0, 200, 400]], [0.5, 0.4, 0.35])
    np.testing.assert_allclose(found.predict([100.0, 200, 400]), [0.5, 0.4, 0.35], rtol=1e-8)
    assert np.isnan(list(found.ci().values())).all() and np.isnan(found.interval([800.0])).all()
    assert found.notes == ["3 points for 3 parameters: none is spare, so there is no interval"]
    with pytest.raises(InputError, match="spare"):
        found.draws()


def test_audit_is_what_refitting_by_hand_gives():
    y = noisy(1)[0]
    audit = fit_law(TiedChinchilla(), [N, D], y).audit()
    keep = np.arange(len(N)) != 7
    without = fit_law(TiedChinchilla(), [N[keep], D[keep]], y[keep])
    assert audit.left_out[7] == pytest.approx(without.predict(N[7], D[7]) / y[7] - 1, rel=1e-4)
    assert sorted(audit.largest) == sorted(np.argsort(N * D)[-6:])
    low, high = audit.ranges["alpha"]
    assert low * (1 - 1e-6) <= without.params["alpha"] <= high * (1 + 1e-6)
    assert "one run left out" in str(audit)


def test_audit_leaves_a_run_that_the_law_cannot_do_without():
    five = [0, 6, 12, 18, 4]
    audit = fit_law(TiedChinchilla(), [N[five], D[five]], LOSS[five]).audit()
    assert np.isnan(audit.left_out).tolist() == [False] * 4 + [True]  # without it all have the same D/N


def test_report_names_every_parameter():
    text = fit_law(PowerLaw(), [[100, 200, 400, 800, 1600]], [0.5, 0.4, 0.35, 0.31, 0.3]).report()
    assert "E + A n^-alpha fitted to 5 points by lsq" in text
    assert all(f"\n  {name}" in text for name in ("E", "A", "alpha"))


def test_error_law_of_convex_data_has_a_negative_gamma_instead_of_a_wrong_fit():
    L = np.linspace(2, 5, 10)
    found = fit_law(ExpOfLoss(), [L], 0.3 + 0.01 * np.exp(0.8 * L))
    assert found.params["gamma"] == pytest.approx(-0.8, rel=1e-5)
    np.testing.assert_allclose(found.predict(L), 0.3 + 0.01 * np.exp(0.8 * L), rtol=1e-8)


def test_solve_takes_starts_of_its_own_for_each_problem():
    form = PowerLaw()
    n = np.geomspace(10, 1000, 8)[None]
    Z = form.prepare(n[:, :, None], form.units(n, np.ones(8)))
    theta = np.array([[0.3, 0.1], [-1.0, -0.5], [0.5, 1.0]])
    Y = form.curve(theta, Z)[0].T
    starts = np.stack([theta + 0.1, theta - 0.05], axis=2)  # (P, m, S)
    solved = solve(form, Z, Y, np.ones_like(Y), starts, None)
    np.testing.assert_allclose(solved.theta, theta, rtol=1e-7)
    assert solved.converged.all() and solved.cost.max() < 1e-18


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        ([[1e6, 2e6, 4e6], [1e8, 1e8, 3e8]], [3.0, 2.9, 2.7], r"4 parameters \(E, A, B, alpha\).*3 are given"),
        ([[1e6, 2e6, 4e6, 8e6], [2e7, 4e7, 8e7, 16e7]], [3.0, 2.9, 2.8, 2.7], "same tokens per params"),
        ([[1e6] * 5, [1e7, 2e7, 4e7, 8e7, 9e7]], [3.0, 2.9, 2.8, 2.7, 2.6], "same params"),
        ([[1e6, 2e6, 4e6, 8e6, 9e6], [1e7] * 5], [3.0, 2.9, 2.8, 2.7, 2.6], "same tokens"),
        ([[1e6, 2e6, 4e6, 4e6], [1e8, 1e8, 3e8, 3e8]], [3.0, 2.9, 2.7, 2.71], "3 are given"),
    ],
)
def test_points_that_do_not_determine_the_law_are_refused(X, y, message):
    with pytest.raises(InputError, match=message):
        fit_law(TiedChinchilla(), X, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": [3.0, np.nan, 2.5, 2.4, 2.3]}, "target: entry 1 is nan"),
        ({"y": [3.0, "x", 2.5, 2.4, 2.3]}, "target: numbers are expected"),
        ({"X": [[1, 2, 3, 4, -5]]}, "n: entry 4 is -5.0, a positive"),
        ({"X": [[1, 2, 3, 4, np.inf]]}, "n: entry 4 is inf"),
        ({"y": [3.0, 2.5, 2.4]}, "each of 5 points"),
        ({"weight": [1, 1, 1, 1, -1]}, "non-negative weights"),
        ({"objective": "l1"}, "unknown objective 'l1'"),
        ({"n_starts": 0}, "positive numbers"),
        ({"y": [3.0, 2.5, -1.0, 2.4, 2.3], "objective": "huber_log"}, "target: entry 2 is -1.0, a positive"),
    ],
)
def test_bad_values_are_named(change, message):
    arguments = {"X": [[1, 2, 3, 4, 5]], "y": [3.0, 2.5, 2.4, 2.3, 2.2]} | change
    with pytest.raises(InputError, match=message):
        fit_law(PowerLaw(), **arguments)


def test_bad_questions_are_refused():
    found = fit_law(PowerLaw(), [[100, 200, 400, 800, 1600]], [0.5, 0.4, 0.35, 0.31, 0.3], objective="huber_log")
    with pytest.raises(InputError, match="level 95"):
        found.ci(95)
    with pytest.raises(InputError, match="did you mean 'bootstrap'"):
        found.ci(method="bootstap")
    with pytest.raises(InputError, match="hessian"):
        found.ci(method="hessian")
    with pytest.raises(InputError, match="too few to resample"):
        fit_law(PowerLaw(), [[100, 200, 400, 800]], [0.5, 0.4, 0.35, 0.31]).ci(method="case")


def test_columns_are_checked_and_never_overflow():
    assert column("tokens", [2**62, 10**19]).dtype == np.float64
    with pytest.raises(InputError, match="one dimension"):
        column("x", [[1.0]])
    with pytest.raises(InputError, match="at least one entry"):
        column("x", [])
    with pytest.raises(InputError, match="N 2, D 3"):
        aligned({"N": [1, 2], "D": [1, 2, 3]})
