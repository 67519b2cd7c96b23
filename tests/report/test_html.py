"""The page: whole, self-contained, escaped, readable in light and dark, honest about what failed."""

import html.parser
import re
from itertools import pairwise
from pathlib import Path

import pytest

from downriver import report
from downriver.core import InputError
from downriver.forecast import Backtest
from downriver.study import Result

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced, and keeps what the tests ask about."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data.replace("\u202f", " ")


@pytest.fixture(scope="session")
def source(
    result: Result, wounded: Result, single: Result, forecasts: list[Backtest], tmp_path_factory: pytest.TempPathFactory
) -> str:
    path = tmp_path_factory.mktemp("page") / "deeper" / "report.html"
    assert report.write(path, [result, wounded, single], forecasts, title="All at once") == path
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def page(source: str) -> Page:
    return Page(source)


def test_has_verdicts_arms_figures_and_what_was_run(page: Page, result: Result) -> None:
    for words in ("holds", "fails", "undecided", "All at once", "What does fine-tuning buy?", "2,000 examples"):
        assert words in page.text
    for verdict in result.verdicts():
        assert verdict.claim.text in page.text
    rows = result.rows()
    assert all(arm in page.text for arm in result.arms)
    assert rows["torch_version"][0] in page.text and rows["device"][0] in page.text
    assert "20 finished" in page.text and "5 finished, 4 failed" in page.text
    # 5 claims; 4 + 2 + 1 metrics that differ; 3 costs and 2 sides of the first study; 2 forecasts, wide and narrow
    labelled = [a for t, a in page.tags if t == "svg" and a.get("role") == "img"]
    assert len(labelled) >= 5 + 7 + 5 + 4 and all(a.get("aria-label") for a in labelled)
    figures, captions = ([t for t, _ in page.tags].count(tag) for tag in ("figure", "figcaption"))
    assert figures == captions > 15


def test_numbers_in_the_table_are_the_rows_means(page: Page, result: Result) -> None:
    for arm in result.arms:
        mean = result.rows().filter(metric="accuracy", arm=arm)["value"].mean()
        assert f"{100 * mean:.1f}" in page.text
    assert "46 TFLOPs" in page.text and "147 k" in page.text and "1 min 04 s" in page.text


def test_fetches_nothing(page: Page, source: str) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "img", "video", "audio", "base", "form")
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in source and "url(" not in source and "://" not in source
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_escapes_what_users_and_exceptions_say(page: Page, source: str) -> None:
    assert "<script" not in source and "<b>memory" not in source and "<i>tears" not in source
    for words in ("<script>alert('x')</script>", "out of <b>memory</b>", "Ties & <i>tears</i>", "Traceback"):
        assert words in page.text


def test_failures_and_missing_values_are_shown(page: Page) -> None:
    assert "dead, seeds 0, 1 and 2" in page.text and "once, seed 1" in page.text
    assert "ValueError: diverged" in page.text and "1 of 3 seeds failed" in page.text
    assert "—" in page.text and "one seed: no interval" in page.text.lower()
    assert "seed 1 left out for want of a value" in page.text


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for t, a in page.tags if t == "a"} == {"#study-sample", "#study-wounded", "#study-single"}


def test_headings_do_not_skip_a_level(page: Page) -> None:
    levels = [int(t[1]) for t, _ in page.tags if re.fullmatch("h[1-6]", t)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_colours_can_be_read_in_light_dark_and_print(source: str) -> None:
    themes = [dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", source, re.S)]
    assert len(themes) == 3
    for theme in themes:
        for ground in ("paper", "card"):
            for ink in ("ink", "soft", "accent", "holds", "fails", "undecided"):
                assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground, theme)
        for word in ("holds", "fails", "undecided"):
            assert contrast(theme[word], theme[f"{word}-back"]) >= 4.5, (word, theme)


def test_twenty_arms_and_ten_metrics(wide: Result, tmp_path: Path) -> None:
    page = Page(report.write(tmp_path / "wide.html", [wide]).read_text(encoding="utf-8"))
    assert page.text.count("a rather long arm name 19") > 3
    assert "4 more metrics" in page.text and "No claim was made" in page.text
    assert "on the Pareto front" in str(page.tags).lower().replace("pareto", "Pareto")


def test_forecasts_alone_and_the_default_title(forecasts: list[Backtest], result: Result, tmp_path: Path) -> None:
    alone = Page(report.write(tmp_path / "forecast.html", [], forecasts[:1]).read_text(encoding="utf-8"))
    assert "Forecast of error" in alone.text and "training examples" in alone.text
    assert ("truth inside the interval" in alone.text) != ("truth outside the interval" in alone.text)
    titled = Page(report.write(tmp_path / "study.html", [result]).read_text(encoding="utf-8"))
    assert titled.text.count("What does fine-tuning buy?") >= 2


def test_bad_input_writes_nothing(tmp_path: Path, result: Result) -> None:
    with pytest.raises(InputError, match="at least one result or one forecast"):
        report.write(tmp_path / "empty.html", [])
    with pytest.raises(InputError, match="is a folder"):
        report.write(tmp_path, [result])
    assert list(tmp_path.iterdir()) == []


def test_a_study_that_has_not_run_says_so(tmp_path: Path) -> None:
    from downriver.study import Arm, above, study

    @study("idle", seeds=2, claims=[above("a", on="accuracy", value=0.5)])
    def idle(seed, budget, scale):
        yield Arm("a", lambda: {"accuracy": 1.0})

    page = Page(report.write(tmp_path / "idle.html", [idle.result(tmp_path / "runs")]).read_text(encoding="utf-8"))
    assert "Nothing was measured" in page.text and "0 finished, 2 not done yet" in page.text
    assert "The claim is undecided, measured on 1 arm over 2 seeds; 2 runs not done yet." in page.text
    assert "Nothing to compare; seeds 0 and 1 left out for want of a value" in page.text


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
        channels = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
