"""Axes hold every value and have nice ticks; marks lie where their numbers say."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.report.plots import (
    HEIGHT,
    WIDTH,
    Axis,
    Point,
    Series,
    columns,
    linear_axis,
    lines,
    log_axis,
    nice_step,
    scatter,
    tick_text,
)

NUMBERS = st.floats(min_value=-1e9, max_value=1e9, allow_nan=False)
POSITIVE = st.floats(min_value=1e-9, max_value=1e9)


@pytest.mark.parametrize(
    "least,step", [(1, 1), (1.1, 2), (2.1, 2.5), (3, 5), (7, 10), (0.03, 0.05), (12, 20), (0.1, 0.1)]
)
def test_steps_are_nice(least: float, step: float) -> None:
    """Steps are 1, 2, 2.5 or 5 times a power of ten."""
    assert nice_step(least) == pytest.approx(step)


@pytest.mark.parametrize(
    "values,ticks",
    [
        ([0, 10], (0, 2, 4, 6, 8, 10)),
        ([115, 168], (100, 120, 140, 160, 180)),
        ([5, 5], (2, 3, 4, 5, 6, 7, 8)),
    ],
)
def test_linear_ticks(values: list[float], ticks: tuple[float, ...]) -> None:
    """The axis begins and ends at a tick."""
    assert linear_axis("", values).ticks == ticks


@pytest.mark.parametrize(
    "values,ticks",
    [
        ([0.002, 0.3], (0.001, 0.01, 0.1, 1)),
        ([0.02, 0.03], (0.01, 0.02, 0.05, 0.1)),
        ([1], (1, 2, 5, 10)),
        ([0], (1, 2, 5, 10)),
    ],
)
def test_logarithmic_ticks(values: list[float], ticks: tuple[float, ...]) -> None:
    """Powers of ten, with steps between where there are few."""
    assert log_axis("", values).ticks == pytest.approx(ticks)


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.booleans())
def test_linear_axes_hold_every_value(values: list[float], from_zero: bool) -> None:
    """Shares lie between 0 and 1, in the order of the values, with few ticks."""
    axis = linear_axis("", values, from_zero=from_zero)
    assert all(-1e-6 <= axis.share(value) <= 1 + 1e-6 for value in values)
    assert 2 <= len(axis.ticks) <= 9


@given(st.lists(POSITIVE, min_size=1, max_size=20))
def test_logarithmic_axes_hold_every_value(values: list[float]) -> None:
    """Equal ratios take equal room; zero lies at the low end."""
    axis = log_axis("", values)
    assert all(-1e-6 <= axis.share(value) <= 1 + 1e-6 for value in values)
    assert axis.share(0) == 0
    assert 2 <= len(axis.ticks) <= 9
    assert math.isclose(axis.share(axis.low * 10) - axis.share(axis.low), 1 / math.log10(axis.high / axis.low))


@pytest.mark.parametrize(
    "value,text", [(0, "0"), (0.001, "0.001"), (1e-5, "1e-05"), (2500, "2,500"), (0.25, "0.25"), (1e9, "1e+09")]
)
def test_tick_texts_are_short(value: float, text: str) -> None:
    """No trailing zeros, and no more than the value needs."""
    assert tick_text(value) == text


def test_points_lie_inside_and_labels_apart() -> None:
    """Labels of close points don't cover each other, and none leaves the picture."""
    axis = Axis("x", 0, 10, (0, 10))
    points = tuple(Point(x, 5, label="a rather long label") for x in (1, 1.1, 1.2, 9.9))
    plot = scatter("p", "t", "d", axis, axis, [Series("s", points)])
    tops = [float(top) for top in re.findall(r'<text y="([\d.]+)" class="label"', plot)]
    assert len(tops) == len(set(tops[:3])) + 1 == 4
    assert plot.count('text-anchor="end">a rather') == 1
    places = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', plot)
    assert all(0 < float(x) < WIDTH and 0 < float(y) < HEIGHT for x, y in places)


def test_words_in_plots_are_escaped() -> None:
    """A name with markup in it stays text."""
    axis = Axis("<b>", 0, 1, (0, 1))
    plot = lines("p", "<i>", "a & b", axis, axis, [Series("s", (Point(0, 0, "<u>"),))])
    assert not re.search(r"<[biu]>", plot)
    assert "a &amp; b" in plot


def test_columns_are_shares() -> None:
    """A column a bin, as high as its share; the first edge may be zero."""
    plot = columns("p", "t", "d", [0.0, 0.1, 1.0, 10.0], [1, 2, 1], "KL")
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"', plot)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.1)
    assert "0.1 to 1: 50.00 % of tokens" in plot
    assert columns("p", "t", "d", [0.0, 0.1, 1.0], [0, 0], "KL").count("<rect") == 2
