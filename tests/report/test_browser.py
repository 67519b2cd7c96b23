"""The page in a real headless Chromium: verdicts and figures are there, nothing is fetched, the console is silent."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from downriver import report
from downriver.forecast import Backtest
from downriver.study import Result

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BROWSER is None, reason="no Chromium on the path: install chromium to look at the page for real"
    ),
]


class Visit(NamedTuple):
    """What a browser made of a page: its DOM, what the page asked of the network, what it said on the console."""

    dom: str
    requests: list[str]
    console: list[str]


def visit(page: Path, folder: Path) -> Visit:
    log = folder / "net.json"
    flags = "headless no-sandbox disable-gpu disable-background-networking disable-component-update no-first-run"
    done = subprocess.run(
        [
            str(BROWSER),
            *(f"--{flag}" for flag in flags.split()),
            *(f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}"),
            *("--enable-logging=stderr", "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    net = json.loads(log.read_text())
    start = net["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    started = [e["params"] for e in net["events"] if e["type"] == start and "url" in e.get("params", {})]
    # the browser's own errands have no origin; what a page asks for carries the page's
    asked = [p["url"] for p in started if p["url"].startswith("http") and p.get("initiator") != "not an origin"]
    return Visit(done.stdout, asked, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def test_the_report_renders_and_fetches_nothing(
    result: Result, wounded: Result, forecasts: list[Backtest], tmp_path: Path
) -> None:
    page = report.write(tmp_path / "report.html", [result, wounded], forecasts)
    seen = visit(page, tmp_path)
    assert seen.requests == [] and seen.console == []
    assert "<title>What does fine-tuning buy?</title>" in seen.dom
    for word in ("holds", "fails", "undecided"):
        assert f'<span class="chip {word}">' in seen.dom
    for verdict in result.verdicts():
        assert verdict.claim.text in seen.dom
    assert seen.dom.count('<svg viewBox="0 0 360 148"') == 4  # one for each claim
    assert 'class="truth"' in seen.dom and 'class="thread"' in seen.dom and 'class="frontline"' in seen.dom
    assert "&lt;script&gt;alert('x')&lt;/script&gt;" in seen.dom and "<script" not in seen.dom


def test_the_check_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "leaky.html"
    page.write_text('<!doctype html><img src="http://tracker.invalid/a.png"><script>console.error("boom")</script>')
    seen = visit(page, tmp_path)
    assert seen.requests == ["http://tracker.invalid/a.png"]
    assert len(seen.console) == 1 and "boom" in seen.console[0]
