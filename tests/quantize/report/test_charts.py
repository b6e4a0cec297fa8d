"""Charts as SVG: text, points and ids are right for any input, and equal charts give equal markup."""

import re
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.report.charts import (
    Axis,
    Chart,
    Histogram,
    LegendEntry,
    Point,
    Series,
    chart_svg,
    histogram_svg,
    legend,
    tick_text,
)

WIDTH, HEIGHT = 720, 374.4
POSITIVE = st.floats(min_value=1e-9, max_value=1e9)


def chart(*points: Point, log: bool = False, **changes: object) -> Chart:
    """A chart of one series."""
    parts = {"title": "t", "description": "d", "x": Axis("x"), "y": Axis("y", log=log)}
    return Chart(**parts | {"series": (Series("s", points),)} | changes)  # type: ignore[arg-type]


def texts(svg: str) -> list[str]:
    """The text elements of a drawing."""
    return [element.text or "" for element in ET.fromstring(svg).iter("text")]  # noqa: S314 - our own


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=5), st.booleans())
def test_points_are_inside_the_drawing(values: list[tuple[float, float]], log: bool) -> None:
    """Every marker lies in the view box, and both axes have ticks."""
    svg = chart_svg("p", chart(*(Point(*pair) for pair in values), log=log))
    marks = re.findall(r'<use href="#p-\w+" x="([\d.-]+)" y="([\d.-]+)"', svg)
    assert len(marks) == len(values)
    assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in marks)
    assert len(texts(svg)) >= 2 + 2


def test_text_is_plain_and_escaped() -> None:
    """Names are neither markup nor mathematical notation, and an underscore hides nothing."""
    label = "<b>$\\frac$ _a_ & "
    value = chart(Point(1, 1, label), title="<i>", description="a & b", x=Axis("$x_1$"))
    svg = chart_svg("p", value)
    assert {label, "$x_1$"} <= set(texts(svg))
    assert svg == chart_svg("p", value)
    assert '<title id="p-title">&lt;i&gt;</title><desc id="p-desc">a &amp; b</desc>' in svg


def test_a_drawing_is_part_of_its_page() -> None:
    """Colours are variables of the style sheet; ids have the name of the chart; nothing is loaded."""
    svg = chart_svg("p", chart(Point(1, 1), Point(2, 2), kind="lines"))
    assert "var(--c0)" in svg
    assert not re.search(r"#[0-9a-f]{6}|font-family|url\(|xmlns|<style|<metadata", svg)
    assert all(identifier.startswith("p-") for identifier in re.findall(r' id="([^"]*)"', svg))


def test_labels_do_not_overlap() -> None:
    """Labels of close points are below each other; at the right edge a label is left of its point."""
    points = [Point(x, 5, "a rather long label") for x in (1, 1.001, 1.002, 9.9)]
    svg = chart_svg("p", chart(*points))
    labels = [element for element in ET.fromstring(svg).iter("text") if element.text == points[0].label]  # noqa: S314
    heights = [float(element.get("y") or re.findall(r"[\d.]+", element.get("transform", ""))[1]) for element in labels]
    assert len(labels) == 4
    assert len({round(height) for height in heights[:3]}) == 3
    assert "text-anchor: end" in (labels[3].get("style") or "")


@pytest.mark.parametrize("counts,shares", [((1, 2, 1), 3), ((0, 0, 0), 0)])
def test_a_histogram_has_a_bar_per_bin(counts: tuple[int, ...], shares: int) -> None:
    """The first edge may be 0; decades have ticks."""
    svg = histogram_svg("p", Histogram("t", "d", "KL", (0.0, 0.1, 1.0, 10.0), counts))
    assert svg.count("fill: var(--c0)") == 3
    assert {"0.1", "1", "10"} <= set(texts(svg))
    assert shares == sum(count > 0 for count in counts)


def test_the_legend_differs_without_colour() -> None:
    """Each series has a marker of its own; a single series needs no legend."""
    two = chart(series=(Series("a", ()), Series("b", (), hollow=True)))
    assert legend(two) == (LegendEntry("a", "●", "c0"), LegendEntry("b", "○", "c1"))
    assert legend(chart(Point(1, 1))) == ()


@pytest.mark.parametrize(
    "value,text", [(0, "0"), (0.001, "0.001"), (1e-5, "1e-05"), (2500, "2,500"), (0.25, "0.25"), (1e9, "1e+09")]
)
def test_tick_texts_are_short(value: float, text: str) -> None:
    """No trailing zeros, and no more digits than the value needs."""
    assert tick_text(value) == text
