"""The figures: every one is well-formed, says what it shows, and puts its marks where the numbers are."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from downriver.forecast import Backtest
from downriver.report import figures
from downriver.report.numbers import Format
from downriver.report.summary import summarise
from downriver.report.svg import Axis, shorten
from downriver.study import Result

POINTS = Format(100, "%", 1)


def parsed(svg: Markup) -> ElementTree.Element:
    assert isinstance(svg, Markup)
    root = ElementTree.fromstring(str(svg))
    assert root.get("role") == "img" and root.get("aria-label")
    return root


def marks(root: ElementTree.Element, css: str) -> list[ElementTree.Element]:
    return [e for e in root.iter() if e.get("class") == css]


def center(diamond: ElementTree.Element) -> float:
    return np.mean([float(p.split(",")[0]) for p in diamond.get("points", "").split()]).item()


def test_differences_put_a_dot_a_seed_on_one_scale() -> None:
    values = {0: -0.01, 1: 0.0, 2: 0.02, 3: 0.03}
    root = parsed(figures.differences(values, (0.01, -0.005, 0.025), 0.015, POINTS, ("worse", "better"), "undecided"))
    x = {d[0].text: float(d.get("cx", "")) for d in marks(root, "seed")}
    at = [x[f"seed {seed}: {POINTS.difference(value)}"] for seed, value in values.items()]
    slope = np.diff(at) / np.diff(list(values.values()))
    assert np.allclose(slope, slope[0], rtol=0.02)
    (mean,), (bar,), (margin,) = marks(root, "mean undecided"), marks(root, "bar undecided"), marks(root, "margin")
    place = lambda v: at[1] + slope[0] * v  # noqa: E731
    assert center(mean) == pytest.approx(place(0.01), abs=0.3)
    assert [float(bar.get(k, "")) for k in ("x1", "x2")] == pytest.approx([place(-0.005), place(0.025)], abs=0.3)
    assert float(margin.get("x1", "")) == pytest.approx(place(0.015), abs=0.3)
    (beyond,) = marks(root, "beyond")
    assert float(beyond.get("x", "")) == pytest.approx(place(0.015), abs=0.3)


def test_one_seed_has_a_dot_and_no_bar() -> None:
    root = parsed(figures.differences({0: 0.02}, (0.02, -math.inf, math.inf), 0.0, POINTS, ("a", "b"), "undecided"))
    assert len(marks(root, "seed")) == 1 and not marks(root, "bar undecided")
    assert "one seed: no interval" in root.get("aria-label", "")


def test_dots_do_not_cover_one_another() -> None:
    root = parsed(
        figures.differences(dict.fromkeys(range(5), 0.01), (0.01, 0.01, 0.01), 0, POINTS, ("a", "b"), "holds")
    )
    places = {(d.get("cx"), d.get("cy")) for d in marks(root, "seed")}
    assert len(places) == 5


def test_arms_join_the_same_seed_and_break_at_gaps(result: Result, wounded: Result) -> None:
    found = summarise(result)
    column = found.columns[0]
    root = parsed(figures.arms(column, found.arms, "accuracy"))
    assert len(marks(root, "seed")) == 20 and len(marks(root, "thread")) == 5
    assert all(len(re.findall("[ML]", thread.get("d", ""))) == 4 for thread in marks(root, "thread"))
    assert [t.text for t in marks(root, "best number")] == [column.format.bare(column.cells["merge"].mean)]
    broken = summarise(wounded)
    root = parsed(figures.arms(broken.columns[0], broken.arms, "accuracy", broken.failed))
    assert not marks(root, "thread")  # the arm in the middle failed: no neighbours to join
    assert [t.text for t in marks(root, "absent")] == ["failed"]
    root = parsed(figures.arms(broken.columns[1], broken.arms, "f1", broken.failed))
    assert [t.text for t in marks(root, "absent")] == ["no value", "failed"]


def test_tradeoff_is_logarithmic_and_sets_zeros_apart() -> None:
    gain = figures.Quantity("accuracy", "higher", str, lambda ticks: [f"{t:g}" for t in ticks])
    points = {"free": (0.0, 0.5), "a": (10.0, 0.6), "b": (100.0, 0.7), "c": (1000.0, 0.65), "d": (1000.0, 0.8)}
    root = parsed(figures.tradeoff(points, figures.Quantity.of_cost("seconds"), gain))
    assert len(marks(root, "front")) == 4 and len(marks(root, "beaten")) == 1
    x = {c[0].text.split(":")[0]: float(c.get("cx", "")) for c in root.iter() if c.get("class") in ("front", "beaten")}
    assert x["b"] - x["a"] == pytest.approx(x["d"] - x["b"], abs=0.3)
    assert x["free"] < x["a"] - 20


@given(st.dictionaries(st.text("abcdef", min_size=1), st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_pareto_front(points: dict[str, tuple[int, int]]) -> None:
    front = figures.pareto(points)  # cheaper and higher are better
    beats = lambda p, q: p != q and p[0] <= q[0] and p[1] >= q[1]  # noqa: E731
    for arm, p in points.items():
        assert (arm in front) == (not any(beats(q, p) for q in points.values()))
    assert [points[a] for a in front] == sorted(points[a] for a in front)


def test_tradeoff_of_two_metrics_follows_their_directions(result: Result) -> None:
    found = summarise(result)
    ece, accuracy = found.find("ece"), found.find("accuracy")
    assert ece is not None and accuracy is not None
    x, y = figures.Quantity.of_metric(ece, "ece"), figures.Quantity.of_metric(accuracy, "accuracy")
    assert (x.better, y.better, x.log) == ("lower", "higher", False)
    points = {a: (ece.cells[a].mean, accuracy.cells[a].mean) for a in found.arms}
    assert set(figures.pareto(points, (x.better, y.better))) == {"probe", "full", "merge"}


@pytest.mark.parametrize("width", [360.0, 620.0])
def test_forecast_shows_fit_truth_and_forecast_on_one_scale(forecasts: list[Backtest], width: float) -> None:
    test = forecasts[1]
    root = parsed(figures.forecast(test, Format(decimals=3), width))
    fitted, truth, said = marks(root, "fitted"), marks(root, "truth"), marks(root, "mean arm")
    assert (len(fitted), len(truth), len(said)) == (5, 3, 3)
    y = np.array([float(c.get("cy", "")) for c in fitted + truth])
    values = np.concatenate([test.fit_y, test.held_y])
    slope, offset = np.polyfit(values, y, 1)
    assert np.allclose(slope * values + offset, y, atol=0.15) and slope < 0
    assert [center(d) for d in said] == pytest.approx([float(c.get("cx", "")) for c in truth], abs=0.1)
    (shade,) = marks(root, "hidden")
    assert max(float(c.get("cx", "")) for c in fitted) < float(shade.get("x", "")) < float(truth[0].get("cx", ""))


@given(
    st.floats(-1e6, 1e6, allow_subnormal=False),
    st.floats(1e-6, 1e6),
    st.booleans(),
)
def test_ticks_lie_inside_the_axis(low: float, span: float, log: bool) -> None:
    values = (span, span * 50) if log else (low, low + span)
    axis = Axis.around(values, 0, 100, log)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 8
    assert all(-1e-6 <= axis(t) <= 100 + 1e-6 for t in ticks)


def test_an_axis_of_one_value_has_room() -> None:
    assert Axis.around([0.0], 0, 100)(0.0) == 50 and Axis.around([7.0, 7.0], 0, 100, log=True)(7.0) == pytest.approx(50)


def test_shortened_names_keep_both_ends() -> None:
    assert shorten("short", 100) == "short"
    cut = shorten("a_rather_long_name_of_an_arm", 90)
    assert cut.startswith("a_rath") and cut.endswith("arm") and "…" in cut and len(cut) < 16
