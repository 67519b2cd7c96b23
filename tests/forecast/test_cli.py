"""``downriver forecast`` end to end."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from downriver.cli.forecast import app
from downriver.core.errors import InputError
from downriver.forecast import RunTable

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


def test_predict_is_fit_with_a_plan(runs, plan):
    rows = json.loads(run("fit", runs, "--predict", plan, "--json"))
    assert json.loads(run("predict", runs, plan, "--json")) == rows
    assert json.loads(run("predict", runs, "--params", 6.9e9, "--tokens", 138e9, "--json")) == rows[:1]
    with pytest.raises(InputError, match="a table of targets, or both"):
        run("predict", runs, "--params", 6.9e9)


def test_intervals_can_be_widened(runs, plan):
    (one, *_), (two, *_) = (json.loads(run("predict", runs, plan, "--json", "--widen", by)) for by in (1, 2))
    for name in ("loss", "error"):
        assert two[name] == one[name]
        assert two[f"{name}_high"] - two[name] == pytest.approx(2 * (one[f"{name}_high"] - one[name]))
        assert two[name] - two[f"{name}_low"] == pytest.approx(2 * (one[name] - one[f"{name}_low"]))


def test_products_beyond_64_bits_stay_positive(runs, tmp_path):
    plan = tmp_path / "huge.csv"
    plan.write_text("params,tokens\n9000000000000000000,9000000000000000000\n")
    (row,) = json.loads(run("predict", runs, plan, "--json"))
    assert row["extrapolation_ratio"] == pytest.approx(6 * 9e18 * 9e18 / (6 * N * D).sum()) and row["loss"] > 0


def test_plans(runs):
    (bought,) = json.loads(run("plan", runs, "--compute", 1e21, "--json"))
    assert bought["compute"] == pytest.approx(1e21) and bought["compute_low"] is None
    assert set(bought) > KEYS and bought["serving_flop_per_token"] == 2 * bought["params"]
    (goal,) = json.loads(run("plan", runs, "--error", bought["error"], "--json"))
    assert goal["params"] == pytest.approx(bought["params"], rel=1e-6)
    assert goal["compute_low"] < 1e21 < goal["compute_high"]
    first, worse, dearer = json.loads(run("plan", runs, "--loss", bought["loss"], "--overtrain", 32, "--json"))
    assert first["params"] == pytest.approx(bought["params"], rel=1e-6)
    assert worse["tokens_per_parameter"] == pytest.approx(640) and worse["loss"] > first["loss"]
    assert dearer["loss"] == pytest.approx(first["loss"]) and dearer["break_even_tokens"] > 0
    text = run("plan", runs, "--compute", 1e21, "--overtrain", 32)
    assert "32x over-trained, same loss" in text and "dearer to train, pays after" in text
    for arguments in ((), ("--compute", 1e21, "--loss", 3)):
        with pytest.raises(InputError, match="one of --compute, --error and --loss"):
            run("plan", runs, *arguments)


@pytest.mark.parametrize("picture", ["law", "residuals", "truth"])
def test_pictures(runs, plan, tmp_path, picture):
    assert "drawn to" in run("plot", runs, tmp_path / "p.png", "--picture", picture, "--predict", plan)
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"


def test_from_an_lm_eval_folder_to_a_plan(tmp_path):
    sizes = ["model,tokens,loss"]
    for i, (n, d, loss, error) in enumerate(zip(N, D, LOSS, ERROR, strict=True)):
        place = tmp_path / "results" / f"me__m{i}"
        place.mkdir(parents=True)
        results = {"quiz": {"acc,none": 1 - error}}
        content = {"model_name": f"me/m{i}", "config": {"model_num_parameters": int(n)}, "results": results}
        (place / "results_2026-01-01T00-00-00.json").write_text(json.dumps(content))
        sizes.append(f"m{i},{d},{loss}")
    (tmp_path / "sizes.csv").write_text("\n".join(sizes))
    table = tmp_path / "runs.csv"
    text = run("collect", tmp_path / "results", table, "--sizes", tmp_path / "sizes.csv")
    assert text.startswith("9 runs with 1 losses and 2 metrics")
    assert "epsilon - k exp(-gamma L)" in run("fit", table)
    assert "relative error" in run("backtest", table, "--hide", 2, "--metric", "error")
    (row,) = json.loads(run("plan", table, "--compute", 1e21, "--json"))
    assert 0 < row["error_low"] < row["error"] < row["error_high"] < 1


def test_ladder_of_ones_own_table(tmp_path):
    table, plan = tmp_path / "runs.csv", tmp_path / "plan.csv"
    bits = 0.4 + 90 * N**-0.3 + 40 * D**-0.25
    rows = zip(N, D, LOSS, bits, 0.7 / (1 + np.exp(-6 * (bits - 0.9))), strict=True)
    table.write_text("params,tokens,loss,bpb_x,error_x\n" + "\n".join(",".join(map(str, row)) for row in rows))
    plan.write_text("params,tokens\n6.9e9,138e9\n")
    (row,) = json.loads(run("ladder", table, "--predict", plan, "--json"))
    assert row["task"] == "x" and row["loss"] == pytest.approx(0.4 + 90 * 6.9e9**-0.3 + 40 * 138e9**-0.25, rel=1e-3)
    text = run("ladder", table, "--up-to", 1e8, "--plot", tmp_path / "p.png")
    assert "points off on average over 1 tasks" in text and (tmp_path / "p.png").exists()
    with pytest.raises(InputError, match="no run has more than 1e"):
        run("ladder", table, "--up-to", 1e12)


def test_coverage(tmp_path):
    compute = np.array([1, 2, 4, 8, 16, 32, 64.0])
    header = "Model,Model Family,Model Size (B),Pretraining Data Size (T),FLOPs (1E21),MMLU"
    lines = [
        f"{family}{i},{family},{c},1,{6 * c},{1 - (0.2 + scale * c**-0.4) * (1 + 0.01 * (-1) ** i)}"
        for family, scale in (("A", 0.6), ("B", 0.4))
        for i, c in enumerate(compute)
    ]
    (tmp_path / "obs_scaling").mkdir()
    (tmp_path / "obs_scaling" / "base_llm_benchmark_eval.csv").write_text("\n".join([header, *lines]))
    one, two, every = json.loads(run("coverage", tmp_path, "--json"))
    assert (one["ladder"], two["ladder"], every["ladder"]) == ("family A", "family B", "all")
    assert one["n"] == 1 and every["n"] == 2 and every["factor"] >= max(one["factor"], two["factor"])
    assert "factor" in run("coverage", tmp_path)


def test_notes_of_a_table_are_said_with_every_forecast(runs, plan, tmp_path):
    lines = runs.read_text().splitlines()
    n, *rest = lines[1].split(",")
    both = tmp_path / "both.csv"
    both.write_text("\n".join([*lines, ",".join([str(float(n) * 1.4), *rest])]))
    rows = json.loads(run("predict", both, plan, "--json"))
    assert all("counted with embeddings and without" in row["warnings"][0] for row in rows)


def test_collect_names_the_loss_and_the_error(shared_data, tmp_path):
    table = tmp_path / "runs.csv"
    arguments = ("collect", shared_data("overtraining_testbed"), table, "--from", "testbed", "--at-least", 20)
    assert run(*arguments, "--loss", "openlm", "--error", "avg_subset_error").startswith("53 runs with 9 losses")
    found, whole = RunTable.read(table), RunTable.from_testbed(shared_data("overtraining_testbed"))
    kept = whole.select(whole.multiplier > 19.9)
    np.testing.assert_allclose(found.loss, kept.losses["openlm"])
    np.testing.assert_allclose(found.metrics["error"], kept.metrics["avg_subset_error"])
    with pytest.raises(InputError, match="unknown loss 'c5_val': did you mean 'c4_val'"):
        run(*arguments, "--loss", "c5_val")
    with pytest.raises(InputError, match="unknown metric 'avg'"):
        run(*arguments, "--error", "avg")
