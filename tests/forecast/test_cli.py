"""``downriver forecast`` end to end."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from downriver.cli.forecast import app
from downriver.core.errors import InputError

N = np.repeat([1e7, 8e7, 4e8], 3)
D = N * np.tile([20.0, 80.0, 320.0], 3)
LOSS = (1.8 + 170 * N**-0.27 + 290 * D**-0.27) * (1 + 0.002 * np.random.default_rng(0).standard_normal(9))
ERROR = 0.85 - 2.2 * np.exp(-0.7 * LOSS)
KEYS = {
    "params",
    "tokens",
    "loss",
    "loss_low",
    "loss_high",
    "error",
    "error_low",
    "error_high",
    "extrapolation_ratio",
    "warnings",
}


def run(*arguments: object) -> str:
    found = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    assert found.stderr == ""
    return found.stdout


@pytest.fixture
def runs(tmp_path):
    lines = [f"{int(n)},{int(d)},{loss},{error}" for n, d, loss, error in zip(N, D, LOSS, ERROR, strict=True)]
    path = tmp_path / "runs.csv"
    path.write_text("params,tokens,loss,error\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.csv"
    path.write_text("params,tokens\n6900000000,138000000000\n80000000,6400000000\n1000000000000,20000000000000\n")
    return path


def test_forecasts_of_a_plan_as_json(runs, plan):
    rows = json.loads(run("fit", runs, "--law", "overtraining", "--predict", plan, "--json"))
    assert [row["params"] for row in rows] == [6.9e9, 8e7, 1e12] and all(set(row) == KEYS for row in rows)
    truth = 1.8 + 170 * 6.9e9**-0.27 + 290 * 138e9**-0.27
    assert rows[0]["loss"] == pytest.approx(truth, rel=0.02)
    assert rows[0]["loss_low"] < rows[0]["loss"] < rows[0]["loss_high"]
    assert rows[0]["error_low"] < rows[0]["error"] < rows[0]["error_high"]
    assert rows[0]["error"] == pytest.approx(0.85 - 2.2 * np.exp(-0.7 * rows[0]["loss"]), rel=1e-3)
    assert rows[0]["extrapolation_ratio"] == pytest.approx(6 * 6.9e9 * 138e9 / (6 * N * D).sum())
    assert rows[0]["warnings"] == []
    assert "inside the range" in rows[1]["warnings"][0] and "times the compute" in rows[2]["warnings"][0]


def test_without_errors_their_fields_are_null(runs, plan, tmp_path):
    bare = tmp_path / "bare.csv"
    bare.write_text("\n".join(",".join(line.split(",")[:3]) for line in runs.read_text().splitlines()))
    rows = json.loads(run("fit", bare, "--predict", plan, "--json"))
    assert rows[0]["error"] is rows[0]["error_low"] is None and rows[0]["loss"] > 0


def test_few_runs_give_values_and_no_interval_in_valid_json(runs, plan, tmp_path):
    few = tmp_path / "few.csv"
    lines = runs.read_text().splitlines()
    few.write_text("\n".join(lines[i] for i in (0, 1, 3, 4, 7)))
    rows = json.loads(run("fit", few, "--predict", plan, "--json"))
    assert rows[0]["loss"] > 0 and rows[0]["loss_low"] is None and "none is spare" in rows[0]["warnings"][0]


@pytest.mark.parametrize("law", ["overtraining", "chinchilla"])
@pytest.mark.parametrize("objective", ["lsq", "huber_log"])
def test_fit_prints_the_law(runs, law, objective):
    (found,) = json.loads(run("fit", runs, "--law", law, "--objective", objective, "--json"))
    assert ("beta" in found["params"]) == (law == "chinchilla")
    assert found["params"]["alpha"] == pytest.approx(0.27, rel=0.5)
    low, high = found["intervals"]["alpha"]
    assert low < found["params"]["alpha"] < high
    text = run("fit", runs, "--law", law, "--objective", objective)
    assert f"by {objective}" in text and "audit: one run left out" in text and "epsilon - k exp(-gamma L)" in text


def test_a_plan_as_a_table_for_people(runs, plan):
    text = run("fit", runs, "--predict", plan)
    assert "loss" in text and "6.9e+09" in text and "note: the target lies inside" in text


def test_groups(runs, plan, tmp_path):
    lines = runs.read_text().splitlines()
    both = tmp_path / "both.csv"
    worse = [line.split(",") for line in lines[1:]]
    both.write_text(
        "\n".join(
            [lines[0] + ",group"]
            + [line + ",web" for line in lines[1:]]
            + [f"{n},{d},{float(loss) + 0.5},{error},code" for n, d, loss, error in worse]
        )
    )
    mixed = json.loads(run("fit", both, "--predict", plan, "--json"))
    assert mixed[0]["warnings"][0] == "2 groups are fitted together: code, web"
    one = json.loads(run("fit", both, "--predict", plan, "--json", "--group", "web"))
    alone = json.loads(run("fit", runs, "--predict", plan, "--json"))
    assert one == alone
    apart = tmp_path / "apart.csv"
    apart.write_text("params,tokens,group\n6900000000,138000000000,code\n6900000000,138000000000,web\n")
    code, web = json.loads(run("fit", both, "--predict", apart, "--json"))
    assert web["loss"] == alone[0]["loss"] and code["loss"] == pytest.approx(web["loss"] + 0.5, abs=1e-3)
    assert [found["group"] for found in json.loads(run("fit", both, "--json"))] == ["code", "web"]
    with pytest.raises(InputError, match="unknown group 'books'"):
        run("fit", both, "--group", "books")


def test_learning_curve(tmp_path):
    curve, plan = tmp_path / "curve.csv", tmp_path / "plan.csv"
    sizes = np.array([50, 100, 200, 400, 800])
    errors = 0.08 + 1.5 * sizes**-0.5 + 0.001 * np.cos(sizes)
    curve.write_text("examples,error\n" + "\n".join(f"{n},{e}" for n, e in zip(sizes, errors, strict=True)))
    plan.write_text("examples\n3200\n100\n80000\n")
    rows = json.loads(run("fit", curve, "--law", "learning-curve", "--predict", plan, "--json"))
    assert [row["examples"] for row in rows] == [3200, 100, 80000]
    assert rows[0]["error"] == pytest.approx(0.08 + 1.5 * 3200**-0.5, rel=0.05)
    assert rows[0]["error_low"] < rows[0]["error"] < rows[0]["error_high"] and rows[0]["extrapolation_ratio"] == 4
    assert "inside the range" in rows[1]["warnings"][0] and "100 times the largest" in rows[2]["warnings"][0]
    assert "E + A n^-alpha" in run("fit", curve, "--law", "learning-curve")
    (outcome,) = json.loads(run("backtest", curve, "--law", "learning-curve", "--json"))
    assert outcome["training_examples"] == 800 and abs(outcome["relative_error"]) < 0.1


def test_learning_curve_of_two_models_is_refused(runs):
    with pytest.raises(InputError, match="'params' has several values"):
        run("fit", runs, "--law", "learning-curve")


def test_backtest(runs, tmp_path):
    rows = json.loads(run("backtest", runs, "--hide", "2", "--json"))
    assert len(rows) == 2 and all(abs(row["relative_error"]) < 0.05 for row in rows)
    assert rows[0]["relative_error"] == pytest.approx(rows[0]["forecast"] / rows[0]["reached"] - 1)
    text = run("backtest", runs, "--hide", "2", "--metric", "error", "--plot", tmp_path / "test.png")
    assert text.startswith("over-training law fitted to 7 points, 2 hidden")
    assert (tmp_path / "test.png").read_bytes()[1:4] == b"PNG"


def test_testbed(shared_data):
    rows = json.loads(run("testbed", shared_data("overtraining_testbed"), "--json"))
    assert len(rows) == 40
    off = {(r["trained_on"], r["metric"]): round(100 * abs(r["relative_error"]), 3) for r in rows[::2]}
    assert off["rpj", "c4_val"] == 0.710 and off["rpj", "avg_subset_error"] == 3.637


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params,tokens,loss\n1e6,2e7,3\n2e6,4e7,2.9\n", "4 parameters"),
        ("params,tokens\n1e6,2e7\n", "unknown column .* 'loss'"),
        ("params,tokens,loss\n1e6,2e7,3\n1e6,2e7,3\n", "the same run"),
        ("params,tokens,loss\n1e6,2e7,bad\n", "column 'loss', row 1"),
    ],
)
def test_bad_runs_are_one_clear_error(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        run("fit", path)


def test_bad_plans_are_one_clear_error(runs, tmp_path):
    plan = tmp_path / "plan.csv"
    plan.write_text("params,tokens\n1e9,-5\n")
    with pytest.raises(InputError, match="target tokens: entry 0 is -5"):
        run("fit", runs, "--predict", plan)
    with pytest.raises(InputError, match="is not there"):
        run("fit", runs, "--predict", tmp_path / "absent.csv")
