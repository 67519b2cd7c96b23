"""DaMo: features, honest folds, the search against the whole list, alignment, the released table, bad input."""

import json

import numpy as np
import polars as pl
import pytest
from sklearn.neural_network import MLPRegressor

from downriver.core import InputError
from downriver.data.mix.batch import BatchMixtureSpace
from downriver.data.mix.damo import DaMo

NAMES = ("web", "code", "chat")
pytestmark = pytest.mark.filterwarnings("ignore:the best mixture")
RNG = np.random.default_rng(3)
RUNS = np.repeat(np.arange(30), 4)
RATIOS = RNG.multinomial(8, [1 / 3] * 3, size=30)[RUNS] / 8
STEPS = np.tile(np.arange(4), 30)
SEEN = RATIOS * (STEPS[:, None] + 1) / 4
SCORES = {"sums": 50 - 30 * (SEEN[:, 0] - 0.5) ** 2, "plans": 40 + 20 * SEEN[:, 1]}
FRAME = pl.DataFrame(dict(zip(NAMES, RATIOS.T, strict=True)))


@pytest.fixture(autouse=True)
def _twins(monkeypatch):  # 30 draws of 45 mixtures: some are the same, which is part of what is tested
    assert len(np.unique(RATIOS, axis=0)) < 30


def fitted(kind="linear", scores=SCORES, **settings):
    return DaMo(kind, **settings).fit(FRAME, STEPS, scores, groups=RUNS)


def test_features_are_the_amount_of_each_set_seen():
    """A law that is linear in p (t + 1) / T is met exactly; at the last checkpoint the features are the ratio."""
    linear = {"a": SEEN @ [1.0, 2.0, 3.0], "b": 5 - SEEN @ [0.0, 1.0, 4.0]}
    damo = fitted(scores=linear)
    np.testing.assert_allclose(damo.predict(FRAME, STEPS), np.column_stack(list(linear.values())), atol=1e-9)
    W = np.array([[0.2, 0.3, 0.5]])
    np.testing.assert_allclose(damo.predict(W), [[2.3, 5 - 2.3]], atol=1e-9)
    np.testing.assert_allclose(damo.predict(W, t=1), [[1.15, 5 - 1.15]], atol=1e-9)
    np.testing.assert_allclose(damo.predict(FRAME.select("chat", "web", "code")), damo.predict(FRAME), atol=1e-12)


def test_the_network_is_the_released_one():
    reference = MLPRegressor(hidden_layer_sizes=(100, 100), max_iter=1500, tol=1e-6, random_state=1)
    values = np.column_stack(list(SCORES.values()))[::4]
    damo = DaMo("mlp", members=0).fit(FRAME[::4], STEPS[::4], values, groups=RUNS[::4], max_t=3)
    np.testing.assert_allclose(damo.predict(FRAME, 0), reference.fit(SEEN[::4], values).predict(RATIOS / 4), rtol=1e-9)


def test_only_last_checkpoints_without_progress():
    damo = fitted(progress=False)
    last = STEPS == 3
    assert len(damo.scores_) == 30
    alone = DaMo("linear").fit(FRAME.filter(last), 0, {k: v[last] for k, v in SCORES.items()}, groups=RUNS[last])
    np.testing.assert_allclose(damo.predict(FRAME), alone.predict(FRAME))


def test_checkpoints_of_a_run_are_never_on_both_sides():
    """The target is each mixture's own noise: only leakage could predict it."""
    mixture = np.unique(RATIOS, axis=0, return_inverse=True)[1].ravel()
    noise = {"noise": RNG.normal(size=30)[mixture]}
    damo = DaMo("gp", members=0).fit(FRAME, STEPS, noise, groups=RUNS)
    assert damo.cv_report().mean_r2 < 0.3
    assert damo.cv_report(groups=np.arange(120)).groups == damo.cv_report().groups == len(np.unique(mixture))
    with pytest.raises(InputError, match="rows 1 and 2 have the same mixture: say with groups"):
        DaMo("gp").fit(FRAME, STEPS, noise)


def test_the_report():
    found = fitted("gp", members=0).cv_report()
    assert found.tasks == ("sums", "plans") and found.folds == 10
    assert found.r2.min() > 0.95 and found.rho.min() > 0.95 and found.mean_r2 > 0.95 and found.mean_rho > 0.95


@pytest.mark.parametrize("kind", ["lightgbm", "exp", "exp+lightgbm"])
def test_every_regressor_learns(kind):
    assert fitted(kind, {"plans": SCORES["plans"]}, members=0).cv_report(folds=3).mean_rho > 0.7


def test_the_proposal_is_the_best_of_the_whole_list():
    damo, space = fitted("gp", members=0), BatchMixtureSpace(NAMES, 16)
    found = damo.propose(space, caution=0.0, top=7)
    W = np.concatenate(list(space.iter()))
    mean = damo.predict(dict(zip(NAMES, W.T, strict=True))).mean(axis=1)
    assert [m.predicted for m in found] == pytest.approx(np.sort(mean)[::-1][:7].tolist())
    assert list(found[0].weights.values()) == W[mean.argmax()].tolist()
    assert (
        found[0].weights["chat"] == 0 and found[0].weights["web"] == 0.1875
    )  # of -30 (w - 1/2)² + 20 (1 - w): a sixth
    assert found[0].spread == 0 and not found[0].inside
    assert damo.propose(space, None, {"chat": (0.25, 1), "web": (0.25, 1)}, top=1)[0].inside
    assert found[0].alternatives["equal shares"] < found[0].predicted
    assert any(name.startswith("only ") for name in found[0].alternatives)
    true = np.mean(list(SCORES.values()), axis=0)
    assert found[0].alternatives["best run"] == pytest.approx(true[STEPS == 3].max())


def test_weights_constraints_checkpoints_and_thresholds():
    damo, space = fitted("linear", members=2), BatchMixtureSpace(NAMES[::-1], 8)
    assert damo.propose(space, {"plans": 1.0}, top=1)[0].weights == {"chat": 0, "code": 1, "web": 0}
    held = damo.propose(space, {"plans": 1.0}, {"code": (0, 0.5), "chat": (0.25, 1)}, top=5)
    assert held[0].weights["code"] == 0.5 and all(m.weights["chat"] >= 0.25 for m in held)
    early, late = (damo.propose(space, {"plans": 1}, top=1, t=t)[0].predicted for t in (0, 3))
    assert early < late
    assert damo.propose(space, threshold=1e3) == []
    assert all(m.predicted >= 55 for m in damo.propose(space, {"plans": 1}, threshold=55.0)) < 45


def test_climbing_finds_what_listing_finds():
    damo, space = fitted("gp", members=0), BatchMixtureSpace(NAMES, 64)
    whole, climbed = (damo.propose(space, top=1, exhaustive=limit)[0] for limit in (10**6, 0))
    assert climbed.weights == whole.weights
    wide = BatchMixtureSpace([*NAMES, *map(str, range(9))], 32)
    ratios = wide.sample(40)
    slopes = RNG.normal(size=12)
    far = DaMo("linear", members=0).fit(dict(zip(wide.domains, ratios.T, strict=True)), 0, ratios @ slopes)
    with pytest.warns(RuntimeWarning, match="outside the runs that were fitted"):
        best = far.propose(wide, top=1)[0]
    assert best.weights[wide.domains[int(slopes.argmax())]] == 1.0


def test_the_ensemble_is_wary_of_what_few_runs_say():
    """Noise makes the members differ: with enough caution a duller mixture that all agree on comes first."""
    noisy = {"score": SCORES["plans"] + RNG.normal(0, 8, 120)}
    damo, space = fitted("lightgbm", noisy), BatchMixtureSpace(NAMES, 8)
    bold, wary = (damo.propose(space, caution=c, top=1)[0] for c in (0.0, 20.0))
    assert 0 < wary.spread < bold.spread and wary.predicted < bold.predicted
    assert damo.propose(space, caution=20.0, top=1)[0] == wary


def test_alignment():
    damo = fitted("gp", members=0)
    same = damo.align(FRAME, damo.predict(FRAME, STEPS), STEPS)
    np.testing.assert_allclose(same.predict(FRAME), damo.predict(FRAME), rtol=1e-9)
    few = FRAME[3::24]
    other = pl.DataFrame({"plans": 7 - 0.5 * damo.predict(few)[:, 1], "sums": 3 + 2 * damo.predict(few)[:, 0]})
    with pytest.warns(RuntimeWarning, match="'plans': the new scores fall"):
        new = damo.align(few, other)
    expected = damo.predict(FRAME) * [2, -0.5] + [3, 7]
    np.testing.assert_allclose(new.predict(FRAME), expected, rtol=1e-6)
    best = new.propose(BatchMixtureSpace(NAMES, 8), {"plans": 1.0}, top=1)[0]
    assert best.weights["code"] == 0 and damo.propose(BatchMixtureSpace(NAMES, 8), {"plans": 1.0}, top=1)[0] != best


@pytest.mark.filterwarnings("ignore:ratios")
def test_the_released_table(shared_data):
    """Fifty pilot runs: with whole mixtures left out trees predict the mean score, and a straight line hardly."""
    pytest.importorskip("openpyxl")
    table = pl.read_excel(shared_data("damo") / "processed_data_random_50.xlsx", engine="openpyxl")
    ratios = np.array([json.loads(text) for text in table["data_mixture_proportion"]])
    mean = {"mean": table.drop(table.columns[:3]).mean_horizontal().to_numpy()}
    arguments = ratios, table["ckpt_id"], mean, table["test_id"]
    trees, line = (DaMo(kind, members=0).fit(*arguments).cv_report() for kind in ("lightgbm", "linear"))
    assert trees.groups == 50
    assert trees.mean_r2 == pytest.approx(0.86, abs=0.05) and line.mean_r2 < 0.6


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: DaMo().fit([[0.2, 0.3]], 0, [1.0]), "ratios, row 1 sums to 0.5"),
        (lambda: DaMo().fit(FRAME, STEPS[:-1], SCORES, RUNS), r"T has shape \(119,\)"),
        (lambda: DaMo().fit(FRAME, STEPS - 0.5, SCORES, RUNS), "the number of a checkpoint"),
        (lambda: DaMo().fit(FRAME, STEPS, SCORES, RUNS[1:]), "a label for each of 120 rows"),
        (lambda: DaMo().fit(FRAME, STEPS, {"a": np.where(STEPS == 1, np.nan, 1.0)}, RUNS), "row 2, 'a' is missing"),
        (lambda: DaMo().fit(FRAME, STEPS, SCORES, RUNS, max_t=2), "T has a checkpoint 3: 0 to 2"),
        (lambda: DaMo().predict(FRAME), "call fit first"),
        (lambda: fitted().propose(BatchMixtureSpace(("web", "code", "cat"), 8)), "'cat' is known to only one"),
        (lambda: fitted().propose(BatchMixtureSpace(NAMES, 8), {"plan": 1}), "did you mean 'plans'"),
        (lambda: fitted().propose(BatchMixtureSpace(NAMES, 8), t=4), "t 4: numbers from 1, 0, and 0 to 3"),
        (lambda: fitted().propose(BatchMixtureSpace(NAMES, 8), constraints={"web": (0.9, 0.5)}), "the lower first"),
        (lambda: fitted().propose(BatchMixtureSpace(NAMES, 8), constraints={"web": (0.3, 0.35)}), "no batch of 8"),
        (lambda: fitted().align(FRAME[:3], {"sums": [1, 2, 3]}), "nothing of task 'plans'"),
        (lambda: fitted().align(FRAME[:1], {"sums": [1], "plans": [2]}), "two rows at least, of 2 numbers"),
        (lambda: fitted().cv_report(folds=200), "from 2 to the"),
    ],
)
def test_bad_input_is_named(act, said):
    with pytest.raises(InputError, match=said):
        act()


def test_few_runs_and_rounded_ratios_are_said():
    with pytest.warns(RuntimeWarning, match=r"5 runs of 3 sets: 8 at least"):
        DaMo("linear", members=0).fit(
            np.random.default_rng(0).dirichlet(np.ones(3), 5), 0, np.arange(5.0), groups=range(5)
        )
