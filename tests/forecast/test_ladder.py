"""The two-step ladder: exact recovery, shared exponents, the public figures, intervals, and what it refuses."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from downriver.core.errors import InputError
from downriver.forecast import RunTable, TaskLadder
from downriver.forecast.ladder import PAPER_TASKS, Apart, Shared, held_out, public

N = np.repeat([1.9e8, 3.7e8, 7.6e8, 1.3e9], 4)
D = N * np.tile([20.0, 40.0, 100.0, 200.0], 4)
TASKS = {"x": (0.45, 50.0, 110.0), "y": (0.7, 90.0, 60.0), "z": (0.2, 30.0, 200.0)}
ALPHA, BETA = 0.28, 0.25
LARGE = (7e9, 4e12)


def loss(task: str, n, d):
    E, A, B = TASKS[task]
    return E + A * np.asarray(n) ** -ALPHA + B * np.asarray(d) ** -BETA


def error(value):
    return 0.7 / (1 + np.exp(-5 * (value - 1.0)))


def ladder_table(noise: float = 0.0, seed: int = 0) -> RunTable:
    rng = np.random.default_rng(seed)
    bits = {t: loss(t, N, D) * (1 + noise * rng.standard_normal(len(N))) for t in TASKS}
    errors = {f"error_{t}": error(v) for t, v in bits.items()}
    names = [f"run {i}" for i in range(len(N))]
    return RunTable(N, D, {f"bpb_{t}": v for t, v in bits.items()}, errors, names=names)


def shared(losses) -> Shared:
    return Shared.fit(N, D, losses, np.ones(losses.shape), "exponents")


@pytest.mark.parametrize("share", ["none", "exponents"])
def test_noise_free_ladders_are_recovered(share):
    ladder = TaskLadder(share).fit(ladder_table())
    said = ladder.forecast(*LARGE)
    for task in TASKS:
        assert said[task].chain[0].value == pytest.approx(loss(task, *LARGE), rel=1e-4)
        assert said[task].value == pytest.approx(error(loss(task, *LARGE)), abs=0.005)
    if share == "exponents":
        assert ladder.loss_law_.exponents == pytest.approx([ALPHA, BETA], rel=1e-4)


def test_one_exponent_for_all_is_one():
    found = TaskLadder("exponent").fit(ladder_table(0.003)).loss_law_.exponents
    assert found[0] == found[1] and found[0] == pytest.approx(0.265, abs=0.03)


def test_shared_law_is_the_least_squares_of_all_tasks_together():
    table = ladder_table(0.01)
    losses = np.stack([table.losses[f"bpb_{t}"] for t in TASKS])
    law = shared(losses)
    zn, zd = np.log(N / law.units[0]), np.log(D / law.units[1])

    def residuals(p):
        alpha, beta = np.exp(p[:2])
        E, A, B = np.exp(p[2:]).reshape(3, len(TASKS), 1)
        return (1 - (E + A * np.exp(-alpha * zn) + B * np.exp(-beta * zd)) / losses).ravel()

    own = np.concatenate([np.log(law.exponents), np.log(np.maximum(law.coefficients, 1e-12)).ravel()])
    starts = [np.concatenate([np.log([a, a]), np.log(np.full(9, 0.3))]) for a in (0.2, 0.4)]
    best = min((least_squares(residuals, start) for start in starts), key=lambda r: r.cost)
    assert (residuals(own) ** 2).sum() <= 2 * best.cost * (1 + 1e-6)


@pytest.mark.slow
def test_sharing_exponents_beats_laws_apart_where_the_tasks_share_them():
    off = {"none": [], "exponents": []}
    truth = np.array([loss(t, *LARGE) for t in TASKS])
    for seed in range(3):
        table = ladder_table(0.01, seed)
        losses = np.stack([table.losses[f"bpb_{t}"] for t in TASKS])
        for share, law in (("none", Apart.fit(N, D, losses)), ("exponents", shared(losses))):
            off[share] += np.abs(law.predict(*LARGE) / truth - 1).tolist()
    assert np.mean(off["exponents"]) < 0.7 * np.mean(off["none"])


def test_intervals_hold_the_truth_and_grow_with_the_target():
    inside = 0
    for seed in range(2):
        ladder = TaskLadder().fit(ladder_table(0.01, seed))
        far, near = ladder.forecast(*LARGE), ladder.forecast(2e9, 1e11)
        inside += sum(far[t].chain[0].low <= loss(t, *LARGE) <= far[t].chain[0].high for t in TASKS)
        for t in TASKS:
            low, high = far[t].interval
            assert 0 <= low < far[t].value < high <= 1
            assert far[t].chain[0].high - far[t].chain[0].low > near[t].chain[0].high - near[t].chain[0].low
    assert inside >= 4  # of 6 at 90 %


def test_checkpoints_teach_the_sigmoid_and_weigh_the_law():
    # the ends lie on the law; the way there differs, and only the error of the checkpoints shows the sigmoid
    table = ladder_table()
    steps = np.linspace(1.6, 1.0, 30)
    rng = np.random.default_rng(0)
    wobble = 1 + 0.004 * rng.standard_normal((len(N), 30))
    rows = np.repeat(np.arange(len(N)), 30)
    bits = {t: (v[:, None] * steps * wobble).ravel() for t, v in ((t, table.losses[f"bpb_{t}"]) for t in TASKS)}
    names = [f"run {i}" for i in rows]
    checkpoints = RunTable(
        N[rows], D[rows] * np.tile(np.linspace(0.1, 1, 30), len(N)),
        {f"bpb_{t}": v for t, v in bits.items()}, {f"error_{t}": error(v) for t, v in bits.items()}, names=names,
    )  # fmt: skip
    ladder = TaskLadder().fit(table, checkpoints)
    p = ladder.links_["x"].law.params
    assert p["k"] == pytest.approx(5, rel=0.1) and p["L0"] == pytest.approx(1.0, abs=0.03)
    assert len(ladder.links_["x"].law.y) == 16 * 27 + 1  # a tenth skipped, the ideal point added
    assert ladder.losses(*LARGE)["x"] == pytest.approx(loss("x", *LARGE), rel=1e-3)
    with pytest.raises(InputError, match="at least 4 checkpoints of run 'run 0'"):
        TaskLadder(weigh=True).fit(table)


def test_bad_ladders_are_refused():
    table = ladder_table()
    with pytest.raises(InputError, match="unknown share 'all'"):
        TaskLadder("all").fit(table)
    with pytest.raises(InputError, match="unknown task of the ladder 'w'"):
        TaskLadder().fit(table, tasks=["w"])
    with pytest.raises(InputError, match="no task has both a loss soft_<task>"):
        TaskLadder(measure="soft").fit(table)
    with pytest.raises(InputError, match="skip 1"):
        TaskLadder(skip=1).fit(table)
    with pytest.raises(InputError, match="different runs are too few"):
        TaskLadder().fit(table.select([0, 1, 4]))
    with pytest.raises(InputError, match="vary both"):
        TaskLadder().fit(table.select([0, 4, 8, 12]))
    fitted = TaskLadder().fit(table)
    with pytest.raises(InputError, match="target params: entry 0 is -1"):
        fitted.forecast(-1, 1e9)
    with pytest.raises(InputError, match="unknown run 'run 99'"):
        held_out(table, ["run 99"], fitted)


@pytest.mark.slow
def test_public_ladder_is_off_as_published(shared_data):
    rows = public(shared_data("olmo_ladder"), TaskLadder("none"))
    off = {(row["run"], row["task"]): abs(row["points_off"]) for row in rows}
    card = {
        "mmlu_test": (0.9, 0.7), "piqa_val": (0.8, 0.9), "hellaswag_val": (1.2, 2.1), "socialiqa_val": (1.3, 1.7),
        "csqa_val": (3.3, 3.7), "openbookqa_test": (5.1, 3.7), "arc_easy_test": (8.1, 10.1),
        "arc_challenge_test": (10.5, 11.2),
    }  # fmt: skip
    for run, column, mean in (("7B-4T", 0, 3.9), ("13B-5T", 1, 4.3)):
        found = [off[run, task] for task in PAPER_TASKS]
        assert found == pytest.approx([card[task][column] for task in PAPER_TASKS], abs=0.45)
        assert np.mean(found) <= mean
    shared = public(shared_data("olmo_ladder"), TaskLadder())
    for run, mean in (("7B-4T", 3.1), ("13B-5T", 3.1)):
        assert np.mean([abs(row["points_off"]) for row in shared if row["run"] == run]) <= mean
