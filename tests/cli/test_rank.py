"""``downriver rank`` as a user meets it."""

import json

import pytest
import typer
from typer.testing import CliRunner

from downriver.cli.rank import rank
from downriver.core import InputError

app = typer.Typer()
app.command()(rank)
MODELS = ("small:text-encoder:nano:0", "small:text-encoder:nano:1")


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("DOWNRIVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "letters.csv"
    words = [(c * (i + 1), "first" if c in "abc" else "last") for i in range(8) for c in "abcxyz"]
    file.write_text("text,label\n" + "".join(f"{w},{label}\n" for w, label in words))
    return str(file)


def call(*arguments):
    return CliRunner().invoke(app, [*arguments], catch_exceptions=False)


def test_the_ranking_as_text(table):
    done = call(*MODELS, "--task", table, "--resamples", "4")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert "logme" in lines[0] and "90% interval" in lines[0]
    assert {line.split()[1] for line in lines[1:3]} == set(MODELS)
    assert "fine-tuning all 2 for 3 epochs would take about" in done.output


def test_the_ranking_as_json(table):
    done = call(*MODELS, "--task", table, "--score", "knn", "--ped", "--epochs", "0", "--json")
    said = json.loads(done.output)
    assert said["score"] == "knn" and said["fine_tuning_seconds"] is None and "no general features" in said["notes"][0]
    first, second = said["models"]
    assert first["rank"] == 1 and first["score"] >= second["score"] and first["low"] <= first["score"] <= first["high"]
    assert first["parameters"] == 37952 and said["seconds"] > 0
    again = json.loads(call(*MODELS, "--task", table, "--score", "knn", "--ped", "--epochs", "0", "--json").output)
    assert [row["score"] for row in again["models"]] == [row["score"] for row in said["models"]]


def test_a_general_task_goes_with_ped(table):
    done = call(MODELS[0], "--task", table, "--ped", "--general", table, "--epochs", "0", "--resamples", "0", "--json")
    assert json.loads(done.output)["notes"] == [] and json.loads(done.output)["models"][0]["low"] is None


def test_errors_are_ours(table):
    with pytest.raises(InputError, match="unknown score 'logmee'"):
        call(MODELS[0], "--task", table, "--score", "logmee")
    with pytest.raises(InputError, match="leep reads the probabilities"):
        call(MODELS[0], "--task", table, "--score", "leep")
    assert call("--task", table).exit_code == 2


def test_the_ranking_is_held_against_what_was_reached(table, tmp_path):
    names = [f"small:text-encoder:nano:{i}" for i in range(3)]
    ranked = json.loads(call(*names, "--task", table, "--epochs", "0", "--json").output)["models"]
    order, truth = [row["model"] for row in ranked], tmp_path / "truth.csv"

    def write(values):
        lines = [
            f"{name},{seed},{v + d}"
            for name, v in zip(order, values, strict=True)
            for seed, d in ((0, -0.01), (1, 0.01))
        ]
        truth.write_text("model,seed,accuracy\n" + "\n".join([*lines, "another,0,0.99"]) + "\n")

    write([0.9, 0.8, 0.6])
    held = json.loads(call(*names, "--task", table, "--epochs", "0", "--truth", str(truth), "--json").output)["truth"]
    assert held["weighted_tau"] == pytest.approx(1.0) and held["regret"] == pytest.approx(0, abs=1e-12)
    assert held["tau_low"] <= 1.0 and held["top"] == {"1": 1.0, "3": 1.0} and held["size_tau"] is None
    write([0.6, 0.8, 0.9])
    done = call(*names, "--task", table, "--epochs", "0", "--truth", str(truth))
    assert "weighted tau -1.00" in done.output and "the first model loses 0.3" in done.output
    assert "66.7% of the best among the first 1" in done.output


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("name,accuracy\nx,1\n", "unknown column"),
        ("model,accuracy\nother,1\n", "unknown model in"),
        ("model,accuracy,loss\nother,1,2\n", "one column of numbers"),
    ],
)
def test_a_truth_that_does_not_do_is_named_before_anything_is_read(tmp_path, content, word):
    truth = tmp_path / "truth.csv"
    truth.write_text(content)
    with pytest.raises(InputError, match=word):
        call(*MODELS, "--task", "no such task", "--truth", str(truth))
