"""Regressors of mixtures: exact recovery, references, honest cross-validation, and the public runs of the paper."""

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import LinearRegression

from downriver.core import InputError
from downriver.data import MixtureRegressor

RNG = np.random.default_rng(0)
W = RNG.dirichlet(np.ones(4), size=100)
TRUE = np.array([1.0, 0.3, -0.2, -0.9])
LOSS = 2.5 + np.exp(0.4 + W @ TRUE)


def test_the_exponential_law_is_recovered() -> None:
    fitted = MixtureRegressor("exp").fit(W, LOSS)
    law = fitted.law()
    assert law["c"] == pytest.approx(2.5, rel=1e-4)
    assert law["k"] == pytest.approx(0.4 + TRUE.mean(), rel=1e-3)
    np.testing.assert_allclose([law[d] for d in fitted.domains_], TRUE - TRUE.mean(), atol=1e-3)
    np.testing.assert_allclose(fitted.predict(W), LOSS, rtol=1e-6)


def test_units_of_the_target_do_not_matter() -> None:
    noisy = LOSS + RNG.normal(0, 0.01, len(LOSS))
    one, thousand = (MixtureRegressor("exp").fit(W, s * noisy).predict(W) / s for s in (1, 1000))
    np.testing.assert_allclose(one, thousand, rtol=1e-5)


def test_linear_is_scikit_learns() -> None:
    np.testing.assert_allclose(
        MixtureRegressor("linear").fit(W, LOSS).predict(W), LinearRegression().fit(W, LOSS).predict(W), rtol=1e-10
    )


@pytest.mark.parametrize("kind", ["linear", "exp", "lightgbm", "exp+lightgbm", "gp"])
def test_every_regressor_learns_and_takes_columns_by_name(kind: str) -> None:
    names = ["a", "b", "c", "d"]
    frame = pl.DataFrame(dict(zip(names, W.T, strict=True)))
    targets = pl.DataFrame({"loss": LOSS, "score": -LOSS})
    fitted = MixtureRegressor(kind, trees=200).fit(frame[:80], targets[:80])
    predicted = fitted.predict(frame[80:])
    assert predicted.shape == (20, 2) and fitted.targets_ == ("loss", "score")
    assert spearmanr(predicted[:, 0], LOSS[80:]).statistic > 0.85
    np.testing.assert_allclose(fitted.predict(frame[80:].select(names[::-1])), predicted, rtol=1e-12)


def test_missing_losses_are_left_out_of_their_target_only() -> None:
    holes = np.column_stack([LOSS, LOSS])
    holes[:10, 0] = np.nan
    fitted = MixtureRegressor("linear").fit(W, holes)
    assert fitted.dropped_.tolist() == [10, 0]
    np.testing.assert_allclose(fitted.predict(W)[:, 0], LinearRegression().fit(W[10:], LOSS[10:]).predict(W))


def test_rows_of_one_run_are_kept_together() -> None:
    """Five checkpoints a run, and a target that is the run's own noise: only leakage could predict it."""
    mixtures, noise = np.repeat(W[:30], 5, axis=0), np.repeat(RNG.normal(size=30), 5)
    regressor = MixtureRegressor("gp")
    honest = regressor.cross_validate(mixtures, noise)
    leaky = regressor.cross_validate(mixtures, noise, groups=np.arange(150))
    assert honest.groups == 30 and leaky.groups == 150
    assert leaky.rho[0] > 0.9 > 0.5 > honest.rho[0]


def test_cross_validation_predicts_every_run_out_of_fold() -> None:
    report = MixtureRegressor("linear").cross_validate(W, LOSS, folds=4)
    assert report.predicted.shape == (100, 1) and report.folds == 4
    assert report.mse[0] == pytest.approx(((report.predicted[:, 0] - LOSS) ** 2).mean())
    assert report.rho[0] == pytest.approx(spearmanr(report.predicted[:, 0], LOSS).statistic)
    assert not np.allclose(report.predicted[:, 0], MixtureRegressor("linear").fit(W, LOSS).predict(W), rtol=1e-9)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: MixtureRegressor("light").fit(W, LOSS), "did you mean .lightgbm"),
        (lambda: MixtureRegressor("linear").fit(W[:3], LOSS[:3]), "3 runs have target 0: linear needs 4"),
        (lambda: MixtureRegressor("exp").fit(W[:4], LOSS[:4]), "exp needs 5"),
        (lambda: MixtureRegressor("linear").fit(W, LOSS[:-1]), "100 rows are expected"),
        (lambda: MixtureRegressor("linear").fit(W, np.where(LOSS > 4, np.inf, LOSS)), "inf where a finite number"),
        (lambda: MixtureRegressor("linear").cross_validate(W, LOSS, folds=101), "from 2 to the 100 groups"),
        (lambda: MixtureRegressor("linear").cross_validate(W, LOSS, groups=[1, 2]), "a label for each of 100 runs"),
        (lambda: MixtureRegressor("linear").fit(W, LOSS).law(), "is no law"),
        (lambda: MixtureRegressor("linear").fit(W, {"loss": LOSS}).index("los"), "did you mean 'loss'"),
    ],
)
def test_bad_input_is_named(act, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        act()


@pytest.mark.filterwarnings("ignore:mixtures")
def test_the_papers_table_on_its_public_runs(shared_data) -> None:  # type: ignore[no-untyped-def]
    """512 runs of 1M parameters predict 256 others: the correlations that re-fitting the public table gives."""
    folder = shared_data("regmix")
    tables = [
        pl.read_csv(folder / f"{split}_{what}_1m.csv").drop("index")
        for split in ("train", "test")
        for what in ("mixture", "pile_loss")
    ]
    mixtures, losses, new, truth = tables
    target = "metric/the_pile_pile_cc_val_loss"
    for kind, expected, tolerance in (("linear", 90.2, 0.1), ("exp", 96.5, 0.3), ("lightgbm", 99.0, 0.2)):
        predicted = MixtureRegressor(kind).fit(mixtures, losses[target]).predict(new)
        assert 100 * spearmanr(predicted, truth[target]).statistic == pytest.approx(expected, abs=tolerance), kind
