"""Run tables: readers of every layout, and what they refuse."""

import json

import numpy as np
import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.core.measurement import Cost, Measurement
from downriver.forecast import RunTable

GOOD = {"params": [1e6, 2e6, 4e6], "tokens": [2e7, 4e7, 8e7], "loss": [3.5, 3.2, 3.0]}


def csv(folder, text: str):
    path = folder / "runs.csv"
    path.write_text(text)
    return path


def test_tidy_csv_and_parquet_round_trip(tmp_path):
    runs = RunTable(
        [1e6, 2e6],
        [2e7, 4e7],
        {"loss": [3.5, 3.2]},
        {"error": [0.5, np.nan], "error_boolq": [0.4, 0.3]},
        ["a", "b"],
        ["one", "two"],
    )
    for name in ("runs.csv", "runs.parquet"):
        runs.write(tmp_path / name)
        back = RunTable.read(tmp_path / name)
        assert back.frame().equals(runs.frame()) and list(back.groups) == ["a", "b"]
        assert np.isnan(back.metrics["error"][1]) and back.metrics["error_boolq"].tolist() == [0.4, 0.3]


def test_columns_are_float_whatever_they_were(tmp_path):
    path = csv(tmp_path, "params,tokens,loss\n6889410560,9223372036854775807,2.1\n1439795200,900000000000,2.5\n")
    runs = RunTable.read(path)
    assert runs.params.dtype == runs.tokens.dtype == np.float64
    assert (runs.compute > 0).all() and runs.compute[0] == pytest.approx(
        6 * 6889410560 * 9223372036854775807, rel=1e-12
    )
    assert runs.multiplier[1] == pytest.approx(900000000000 / 1439795200)


def test_another_column_may_be_the_loss(tmp_path):
    path = csv(tmp_path, "params,tokens,c4\n1e6,2e7,3.5\n")
    assert RunTable.read(path, loss="c4").loss.tolist() == [3.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params,tokens,los\n1e6,2e7,3.5\n", "did you mean 'los'"),
        ("params,tokens,loss\n1e6,2e7,nan\n", "column 'loss', row 1"),
        ("params,tokens,loss\n1e6,big,3.5\n", "column 'tokens', row 1: 'big'"),
        ("params,tokens,loss\n1e6,2e7,3.5\n-1e6,2e7,3.4\n", "params: entry 1 is -1000000.0, a positive"),
        ("params,tokens,loss\n1e6,2e7,0\n", "loss: entry 0 is 0.0"),
        ("params,tokens,loss\n1e6,inf,3\n", "column 'tokens', row 1"),
        ("params,tokens,loss,error\n1e6,2e7,3,high\n", "column 'error', row 1: 'high'"),
        ("params,tokens,loss\n1e6,2e7,3.5\n2e6,2e7,3.4\n1e6,2e7,3.5\n", "rows 1 and 3 are the same run"),
        ("params,tokens,loss\n", "is empty"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        RunTable.read(csv(tmp_path, text))


def test_the_same_size_twice_is_fine_when_the_losses_differ_or_the_groups_do():
    assert len(RunTable([1e6, 1e6], [2e7, 2e7], {"loss": [3.5, 3.51]})) == 2
    assert len(RunTable([1e6, 1e6], [2e7, 2e7], {"loss": [3.5, 3.5]}, groups=["a", "b"])) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": {}}, "at least one loss or metric"),
        ({"tokens": [1e7]}, "one length"),
        ({"metrics": {"error": [0.5]}}, "error: 2 finite numbers"),
        ({"metrics": {"error": ["a", "b"]}}, "error: numbers"),
        ({"groups": ["a"]}, "groups: 2 labels"),
    ],
)
def test_bad_columns_are_named(change, message):
    good = {"params": [1e6, 2e6], "tokens": [2e7, 4e7], "losses": {"loss": [3.5, 3.2]}}
    with pytest.raises(InputError, match=message):
        RunTable(**(good | change))


def test_select_and_group():
    runs = RunTable(
        GOOD["params"], GOOD["tokens"], {"loss": GOOD["loss"]}, {"error": [0.5, 0.4, np.nan]}, ["a", "b", "a"]
    )
    assert runs.group("a").params.tolist() == [1e6, 4e6] and len(runs.select([2])) == 1
    assert runs.select(runs.params > 1e6).loss.tolist() == [3.2, 3.0]
    with pytest.raises(InputError, match="unknown group 'c'"):
        runs.group("c")


def test_testbed(shared_data):
    runs = RunTable.from_testbed(shared_data("overtraining_testbed"))
    assert len(runs) == 69 and sorted(set(runs.groups)) == ["c4_original", "rpj"]
    assert next(iter(runs.losses)) == "c4_val" and len(runs.losses) == 8 and "val_de-en_100" in runs.losses
    tasks = [name for name in runs.metrics if name.startswith("error_")]
    assert len(tasks) == 46
    np.testing.assert_allclose(np.mean([runs.metrics[t] for t in tasks], axis=0), runs.metrics["avg_error"])
    chinchilla = runs.multiplier / 20  # all runs of the testbed lie on its grid of multipliers
    assert np.isclose(np.log2(chinchilla), np.round(np.log2(chinchilla)), atol=1e-3).all()


def test_testbed_that_is_not_one(tmp_path):
    with pytest.raises(InputError, match="holds no models"):
        RunTable.from_testbed(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.json").write_text('{"results": []}')
    with pytest.raises(InputError, match=r"evaluation_a_heavy\.json is not there"):
        RunTable.from_testbed(tmp_path)
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "evaluation_a_heavy.json").write_text("{}")
    with pytest.raises(InputError, match=r"a\.json is not a model file"):
        RunTable.from_testbed(tmp_path)
    (tmp_path / "models" / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.json is not JSON"):
        RunTable.from_testbed(tmp_path)


def test_chinchilla_points_give_the_known_untied_law(shared_data):
    from downriver.forecast import OverTrainingLaw

    runs = RunTable.from_chinchilla(shared_data("chinchilla") / "svg_extracted_data.csv")
    assert len(runs) == 245
    kept = runs.select(np.argsort(runs.loss)[:-5])
    p = OverTrainingLaw(tied_exponent=False, loss="huber_log").fit(kept.params, kept.tokens, kept.loss).params_
    # Besiroglu et al. 2024 (arXiv:2404.10102) report E 1.82, A 482, B 2085, alpha .348, beta .366 on these points
    assert p["E"] == pytest.approx(1.82, abs=0.01)
    assert p["alpha"] == pytest.approx(0.348, abs=0.003) and p["beta"] == pytest.approx(0.366, abs=0.003)
    assert p["A"] == pytest.approx(482, rel=0.05) and p["B"] == pytest.approx(2085, rel=0.05)


def measurements() -> pl.DataFrame:
    rows = []
    for seed in range(2):
        for arm, size in (("small", 1000), ("large", 8000)):
            cost = Cost(parameters=size, tokens=20 * size)
            named = {"task": "text", "study": "s", "arm": arm, "seed": seed, "cost": cost}
            rows.append(Measurement("loss", 3.0 - size / 1e4 - seed / 100, direction="lower", **named))
            rows.append(Measurement("accuracy", 0.5 + size / 1e5, direction="higher", **named))
    return pl.DataFrame([row.to_row() for row in rows])


def test_measurements_of_a_study():
    runs = RunTable.from_measurements(measurements(), error="accuracy")
    assert runs.params.tolist() == [1000, 8000, 1000, 8000] and runs.tokens[1] == 160_000
    assert runs.loss.tolist() == pytest.approx([2.9, 2.2, 2.89, 2.19])
    assert runs.metrics["error"].tolist() == pytest.approx([0.49, 0.42, 0.49, 0.42])
    assert next(iter(runs.names)) == "small, seed 0" and set(runs.groups) == {"s"}


def test_measurements_that_lack_something(tmp_path):
    with pytest.raises(InputError, match="did you mean 'accuracy'"):
        RunTable.from_measurements(measurements(), error="acuracy")
    with pytest.raises(InputError, match="column 'tokens' is missing"):
        RunTable.from_measurements(measurements().drop("tokens"))
    measurements().write_parquet(tmp_path / "rows.parquet")
    assert len(RunTable.from_measurements(tmp_path / "rows.parquet", task="text")) == 4
    with pytest.raises(InputError, match="unknown metric 'loss'"):
        RunTable.from_measurements(measurements(), task="other")


def test_a_folder_of_trainer_runs(tmp_path):
    import torch
    from safetensors.torch import save_file

    def state(folder, tokens, loss):
        folder.mkdir(parents=True)
        content = {"num_input_tokens_seen": tokens, "log_history": [{"eval_loss": loss}]}
        (folder / "trainer_state.json").write_text(json.dumps(content))

    for name, side in (("a", 10), ("b", 20)):
        for step in (9, 100):
            state(tmp_path / name / f"checkpoint-{step}", 1000 * step, 4 - step / 100)
        save_file(
            {"w": torch.zeros(side, side), "v": torch.zeros(3)},
            tmp_path / name / "checkpoint-100" / "model.safetensors",
        )
    runs = RunTable.from_trainer_states(tmp_path)
    assert sorted(zip(runs.names, runs.params, runs.tokens, runs.loss, strict=True)) == [
        ("a", 103, 100_000, 3), ("b", 403, 100_000, 3),
    ]  # fmt: skip
    state(tmp_path / "b" / "final", 500, 2.0)
    sized = RunTable.from_trainer_states(tmp_path, {"a": (1e3,), "b": (2e3,), "b/final": (3e3,)})
    assert set(zip(sized.names, sized.params, strict=True)) == {("a", 1e3), ("b", 2e3), ("b/final", 3e3)}
    with pytest.raises(InputError, match=r"no model\.safetensors to count"):
        RunTable.from_trainer_states(tmp_path)
    with pytest.raises(InputError, match="unknown run in the table of sizes"):
        RunTable.from_trainer_states(tmp_path, {"a": (1e3,), "b": (2e3,)})
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no trainer_state\.json"):
        RunTable.from_trainer_states(tmp_path / "empty")


def test_trainer_states(tmp_path):
    states = {
        "seen.json": {"num_input_tokens_seen": 5_000_000, "log_history": [{"eval_loss": 3.0}, {"eval_loss": 2.5}]},
        "flos.json": {"total_flos": 6e12, "log_history": [{"loss": 2.0}, {"eval_loss": 2.4}]},
        "untested.json": {"total_flos": 6e12, "log_history": [{"loss": 2.0}]},
        "uncounted.json": {"total_flos": 0, "log_history": [{"eval_loss": 2.0}]},
    }
    for name, state in states.items():
        (tmp_path / name).write_text(json.dumps(state))
    runs = RunTable.from_trainer_states({tmp_path / "seen.json": 1e5, tmp_path / "flos.json": 2e5})
    assert runs.tokens.tolist() == [5e6, 5e6] and runs.loss.tolist() == [2.5, 2.4]
    with pytest.raises(InputError, match="no eval_loss"):
        RunTable.from_trainer_states({tmp_path / "untested.json": 1e5})
    with pytest.raises(InputError, match="neither num_input_tokens_seen nor total_flos"):
        RunTable.from_trainer_states({tmp_path / "uncounted.json": 1e5})
    with pytest.raises(InputError, match="is not there"):
        RunTable.from_trainer_states({tmp_path / "absent.json": 1e5})
