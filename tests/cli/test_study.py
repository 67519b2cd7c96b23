"""``downriver study`` as a user meets it."""

import sys

import pytest
import typer
from typer.testing import CliRunner

from downriver.cli.study import find, study
from downriver.core import InputError
from downriver.study import quickstart

app = typer.Typer()
app.command()(study)

STUDY = """
from downriver.study import Arm, better, study

@study("rivers", claims=[better("wide", than="narrow", on="flow")], seeds=3)
def rivers(seed, budget, scale):
    yield Arm("narrow", lambda: {"flow": 1.0 + seed / 100})
    yield Arm("wide", lambda: {"flow": 2.0 + seed / 10})

@study("dams", seeds=2)
def dams(seed, budget, scale):
    def burst():
        raise RuntimeError("burst [of] water")
    yield Arm("good", lambda: {"flow": 0.0})
    yield Arm("bad", burst)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "waters.py").write_text(STUDY)
    yield tmp_path
    sys.modules.pop("waters", None)


def call(*arguments):
    return CliRunner().invoke(app, ["--executor", "serial", *arguments])


def test_a_study_in_python_by_module_and_by_file(here):
    for name in ("waters:rivers", str(here / "waters.py:rivers")):
        done = call(name, "--seeds", "2", "--report", "page.html")
        assert done.exit_code == 0, done.output
        assert "narrow" in done.output and "wide is better than narrow on flow" in done.output
    assert len(list((here / "downriver-runs/cells/rivers").iterdir())) == 4
    page = (here / "page.html").read_text()
    assert "wide is better than narrow on flow" in page


def test_failed_cells_show_in_the_exit_code(here):
    done = call("waters:dams", "--folder", "elsewhere")
    assert done.exit_code == 1
    assert "failed: bad, seed 0: RuntimeError: burst [of] water" in done.output and "elsewhere/failures" in done.output
    assert len(list((here / "elsewhere/failures/dams").iterdir())) == 2


def test_fresh_runs_again(here):
    assert call("waters:rivers").exit_code == 0
    files = {f: f.stat().st_mtime_ns for f in (here / "downriver-runs/cells/rivers").iterdir()}
    assert call("waters:rivers").exit_code == 0
    assert {f: f.stat().st_mtime_ns for f in files} == files
    assert call("waters:rivers", "--fresh").exit_code == 0
    assert all(f.stat().st_mtime_ns > before for f, before in files.items())


def test_a_study_in_yaml(here):
    (here / "wines.yaml").write_text(
        "{model: 'small:mlp:nano:0', task: wine, budget: 640 examples, seeds: 2, arms: {probe: {adapt: linear_probe}},"
        " claims: [{above: {arm: probe, on: accuracy, value: 0.6}}]}"
    )
    done = call("wines.yaml")
    assert done.exit_code == 0 and "probe is above 0.6 on accuracy" in " ".join(done.output.split()), done.output


def test_without_an_argument_it_is_the_built_in_study(here, monkeypatch):
    rivers = find("waters:rivers")
    asked = []

    def run(*arguments):
        asked.append(arguments)
        return [rivers.run("there", executor="serial", progress=False)], None

    monkeypatch.setattr(quickstart, "run", run)
    done = call("--seeds", "3", "--workers", "1")
    assert done.exit_code == 0, done.output
    assert asked == [("downriver-runs", "serial", 1, False, 3)]
    assert "report: downriver-report.html" in done.output and (here / "downriver-report.html").exists()


def test_what_cannot_be_found_is_named(here):
    for name, message in (
        ("nothing.yaml", r"nothing\.yaml is not there"),
        ("watters:rivers", r"there is no module 'watters'"),
        ("nowhere/waters.py:rivers", r"there is no|did you mean"),
        ("waters:river", r"unknown study of waters 'river': did you mean 'rivers'"),
    ):
        sys.modules.pop("waters", None)
        sys.path[:] = [p for p in sys.path if p != str(here)]
        with pytest.raises(InputError, match=message):
            find(name)
    (here / "broken.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        find("broken:study")
