"""The words: verdict lines and the terminal's table, one seed, failures, forecasts."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from downriver import report
from downriver.forecast import Backtest
from downriver.report import text
from downriver.report.numbers import Format
from downriver.report.summary import summarise
from downriver.study import Result, above, below, better


def printed(renderable: object, width: int = 140) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue().replace("\u202f", " ")


def test_verdict_lines_say_word_claim_and_figures(result: Result) -> None:
    lines = [line.plain.replace("\u202f", " ") for line in report.verdict_lines(result)]
    assert [line.split()[1] for line in lines] == ["holds", "fails", "undecided"]
    first = result.verdicts()[0]
    assert first.claim.text in lines[0]
    assert f"mean difference +{100 * first.mean:.1f} points over 5 seeds" in lines[0]
    assert "one-sided p = 0.031 (Holm over all claims: 0.094)" in lines[0]


def test_table_has_means_intervals_costs_and_a_bold_best(result: Result) -> None:
    shown = printed(report.table(result, width=140))
    assert all(arm in shown for arm in ("probe", "full", "lora", "merge"))
    mean = result.rows().filter(metric="accuracy", arm="full")["value"].mean()
    assert f"{100 * mean:.1f}" in shown and "46 TFLOPs" in shown and "1 min 04 s" in shown
    assert "mean and 95 % interval over 5 seeds; bold: the best mean" in shown
    cells = list(report.table(result).columns[1].cells)
    assert ["bold" in str(cell.style) for cell in cells] == [False, False, False, True]


def test_a_narrow_terminal_shows_claimed_metrics_first_and_counts_the_rest(result: Result) -> None:
    shown = " ".join(printed(report.table(result, width=40), 40).split())
    assert "accuracy ↑" in shown and "loss" not in shown and "4 more metrics not shown" in shown
    assert "probe" in shown and "1 min 04 s" in shown  # names and costs are never cut


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_table_fits_its_terminal(wide: Result, width: int) -> None:
    lines = printed(report.table(wide, width=width), 500).splitlines()
    assert max(len(line.rstrip()) for line in lines[:-1]) <= width
    assert sum("a rather long arm name" in line for line in lines) == 20


def test_failures_missing_values_and_markup_like_names(wounded: Result, run_study) -> None:
    shown = printed(report.table(wounded))
    assert "failed" in shown and "—" in shown and "<script>alert('x')</script>" in shown
    from downriver.core import Measurement

    odd = run_study(
        {"[red]a[/red]": lambda s: [Measurement("m", 1.0 + s)], "b": lambda s: [Measurement("m", 2.0 + 2 * s)]},
        claims=[better("b", than="[red]a[/red]", on="m")],
    )
    assert "[red]a[/red]" in printed(report.table(odd))
    assert "[red]a[/red]" in printed(report.verdict_lines(odd)[0])


def test_one_seed_is_said(single: Result) -> None:
    assert "one seed: no interval" in printed(report.table(single))
    (line,) = report.verdict_lines(single)
    assert "undecided" in line.plain and "on one seed: no interval" in line.plain
    (verdict,) = single.verdicts()
    assert text.reason(verdict, Format()) == "1 seed cannot decide it: at least 3 are needed."


def test_sides_and_reasons_follow_the_claim() -> None:
    assert text.sides(better("a", than="b", on="m")) == ("b better", "a better")
    assert text.sides(above("a", on="m", value=0.8)) == ("below 0.8", "above 0.8")
    assert text.sides(below("a", on="m", value=0.8)) == ("above 0.8", "below 0.8")


def test_reasons_of_the_three_verdicts(result: Result) -> None:
    reasons = [text.reason(v, text.verdict_format(v, result.rows())) for v in result.verdicts()]
    assert "clears the margin of 2 points" in reasons[0]
    assert "falls short of the allowed loss of 1 point" in reasons[1]
    assert "includes zero" in reasons[2]


@pytest.mark.parametrize(("truth", "place", "off"), [(0.30, "inside", "3.3"), (0.40, "outside", "28")])
def test_forecast_in_words(truth: float, place: str, off: str) -> None:
    one, grid = np.array([0.29]), np.array([100.0, 1000.0])
    test = Backtest(
        *("learning curve", "examples", "error", grid, np.array([0.5, 0.4]), np.array([8000.0]), np.array([truth])),
        *(one, one - 0.02, one + 0.02, 0.9, grid, grid, grid, grid),
    )
    said = text.forecast_sentence(test, Format(decimals=2), 0).replace("\u202f", " ")
    assert said == (
        f"At 8,000 examples the law forecasts error 0.29; {truth:.2f} was reached. That is {off} % too low;"
        f" the truth lies {place} the 90 % interval, 0.27 to 0.31."
    )
    covers = "covers" if place == "inside" else "misses"
    assert text.lead([], [], [test]) == f"The forecast's interval {covers} what was really reached."
    unbounded = dataclasses.replace(test, low=one - np.inf, high=one + np.inf)
    assert text.forecast_sentence(unbounded, Format(), 0).endswith("without an interval.")


def test_average_of_several_forecasts(forecasts: list[Backtest]) -> None:
    assert text.forecast_average(forecasts[0]) == ""
    test = forecasts[1]
    inside = ((test.low <= test.held_y) & (test.held_y <= test.high)).sum()
    assert "Over all 3 hidden points" in text.forecast_average(test)
    assert f"{inside} of them" in text.forecast_average(test)


def test_lead(result: Result, wounded: Result) -> None:
    words = [v.verdict for v in result.verdicts()]
    assert text.lead(words, [summarise(result)]) == (
        "Of 3 claims, 1 holds, 1 fails and 1 is undecided, measured on 4 arms over 5 seeds."
    )
    assert text.lead(["holds", "holds"], []) == "Both claims hold."
    assert text.lead([], [summarise(wounded)]).endswith("measured on 3 arms over 3 seeds; 4 runs failed.")
