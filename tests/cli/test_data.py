"""``downriver data mix``: from two tables to a fit, predictions in the asked order, and a proposal."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from downriver.cli import app
from downriver.core import InputError

DOMAINS = ("web", "code", "wiki")
SLOPES = np.array([1.0, 0.2, -0.5])


def loss(W: np.ndarray) -> np.ndarray:
    return 2 + np.exp(W @ SLOPES)


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    W = rng.dirichlet(np.ones(3), size=60)
    frame = pl.DataFrame({"index": np.arange(60)} | dict(zip(DOMAINS, W.T, strict=True)))
    frame.write_csv(tmp_path / "mixtures.csv")
    outcomes = pl.DataFrame({"index": np.arange(60), "loss": loss(W), "other": rng.normal(size=60)})
    outcomes.sample(fraction=1.0, shuffle=True, seed=1).write_csv(tmp_path / "outcomes.csv")
    new = rng.dirichlet(np.ones(3), size=5)
    columns = {"index": [9, 7, 5, 3, 1]} | dict(zip(DOMAINS[::-1], new.T[::-1], strict=True))
    pl.DataFrame(columns).write_csv(tmp_path / "new.csv")
    return tmp_path


def run(*arguments: object) -> dict:
    found = CliRunner().invoke(app, ["data", "mix", *map(str, arguments), "--json"], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return json.loads(found.output)


def test_fit_joins_by_index_and_keeps_the_order_of_new(tables: Path) -> None:
    found = run(
        "fit", tables / "mixtures.csv", tables / "outcomes.csv", "--target", "loss", "--model", "exp",
        "--predict", tables / "new.csv",
    )  # fmt: skip
    assert (found["target"], found["model"], found["runs"]) == ("loss", "exp", 60)
    assert found["cv"]["rho"] > 0.999 and found["cv"]["mse"] < 1e-8
    new = pl.read_csv(tables / "new.csv")
    assert [row["index"] for row in found["predictions"]] == [9, 7, 5, 3, 1]
    np.testing.assert_allclose(
        [row["loss"] for row in found["predictions"]], loss(new.select(DOMAINS).to_numpy()), rtol=1e-5
    )


def test_fit_in_words(tables: Path) -> None:
    arguments = ["data", "mix", "fit", tables / "mixtures.csv", tables / "outcomes.csv", "--target", "loss"]
    found = CliRunner().invoke(app, [*map(str, arguments), "--model", "linear"])
    assert found.exit_code == 0 and "linear on 60 runs of 3 domains" in found.output


def test_propose_with_token_counts(tables: Path) -> None:
    pl.DataFrame({"domain": DOMAINS, "share": [0.8, 0.1, 0.1], "tokens": [8e9, 1e9, 1e9]}).write_csv(
        tables / "prior.csv"
    )
    found = run(
        "propose", tables / "mixtures.csv", tables / "outcomes.csv", "--target", "loss", "--model", "exp", "--exact",
        "--prior", tables / "prior.csv", "--tokens", 5e9, "--max-repeat", 2,
    )  # fmt: skip
    assert found["weights"] == pytest.approx({"web": 0.2, "code": 0.4, "wiki": 0.4}, abs=1e-4)
    assert found["epochs_per_domain"] == pytest.approx({"web": 0.125, "code": 2.0, "wiki": 2.0}, abs=1e-3)
    assert found["predicted"] < min(found["alternatives"].values())
    assert found["warnings"] == []


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, ["--target", "los"], "did you mean 'loss'"),
        ({"outcomes.csv": "index,loss\n1,2.0\n1,3.0\n"}, ["--target", "loss"], "1 is there twice"),
        ({"outcomes.csv": "index,loss\n777,2.0\n"}, ["--target", "loss"], "no index is in both"),
        ({"outcomes.csv": "index,loss\na,2.0\n"}, ["--target", "loss"], "holds Int64"),
        ({"outcomes.csv": "index,web\n1,2.0\n"}, ["--target", "web"], "is in both"),
        ({"mixtures.csv": "index,a,b\n1,0.5,0.9\n"}, ["--target", "loss"], "sums to 1.4"),
        ({"new.csv": "index,web,code,wki\n1,0.5,0.2,0.3\n"}, ["--target", "loss"], "domain 'wiki' is missing"),
    ],
)
def test_bad_input_is_one_error(tables: Path, change: dict[str, str], arguments: list[str], message: str) -> None:
    for name, text in change.items():
        (tables / name).write_text(text)
    paths = [str(tables / "mixtures.csv"), str(tables / "outcomes.csv"), "--predict", str(tables / "new.csv")]
    found = CliRunner().invoke(app, ["data", "mix", "fit", *paths, *arguments, "--model", "linear", "--folds", "2"])
    assert isinstance(found.exception, InputError) and message in str(found.exception), found.exception


def test_the_sweep_from_a_folder_to_a_verified_proposal(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, words in (("river", "a b c d e"), ("road", "a b f g h"), ("noise", "x y z u v")):
        lines = [json.dumps({"text": " ".join(rng.choice(words.split(), 20))}) for _ in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    arguments = ["sweep", folder, "--out", tmp_path / "out", "--runs", 20, "--model", "exp", "--target", "river"]
    found = run(*arguments, "--verify", "ngram")
    assert found["weights"]["river"] > 0.5 > found["weights"]["noise"] and found["targets"] == ["river"]
    measured = {row["mixture"]: row["loss"] for row in found["verified"]}
    assert measured["proposed"] < min(measured["natural"], measured["uniform"], measured["median sampled"])
    assert run("fit", *(tmp_path / "out" / f"{n}.csv" for n in ("mixtures", "outcomes")), "--target", "target")["runs"]
    (folder / "road.jsonl").open("a").write("\n{broken")
    again = CliRunner().invoke(app, ["data", "mix", *map(str, arguments), "--verify", "ngram"])
    assert again.exit_code == 1 and "road.jsonl, record 41" in again.output
    assert "measured loss of proposed" in again.output and "better" in again.output.lower()
