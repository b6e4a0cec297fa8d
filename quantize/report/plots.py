"""Plots as SVG, from numbers alone: axes with nice ticks, points, lines and columns. Colours come from the page."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quantize.report.markup import Markup, element

WIDTH, HEIGHT = 720, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 20, 18, 52
_COLOURS = 8
_LABEL_HEIGHT = 15
_LETTER_WIDTH = 7.2
_TINY = 1e-100
_NICE_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values with a label; `ticks` are the values that get a mark and a number."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class Point:
    """One value pair; `label` stands beside it, `hint` is told when one points at it."""

    x: float
    y: float
    hint: str = ""
    label: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """Points that belong together and share a colour; hollow ones tell themselves apart without it."""

    name: str
    points: tuple[Point, ...]
    hollow: bool = False


def linear_axis(label: str, values: Sequence[float], *, from_zero: bool = False) -> Axis:
    """An axis in equal steps that holds all values."""
    low, high = min(values), max(values)
    low = min(low, 0.0) if from_zero else low
    largest = max(abs(low), abs(high))
    if high - low <= max(1e-9 * largest, _TINY):
        room = largest / 2 if largest > _TINY else 0.5
        low, high = low - room, high + room
    step = nice_step((high - low) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(float(f"{step * number:.12g}") for number in range(first, last + 1))
    return Axis(label, ticks[0], ticks[-1], ticks)


def log_axis(label: str, values: Sequence[float]) -> Axis:
    """An axis in equal ratios that holds all positive values; others lie at its low end."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = (math.log10(edge) for edge in (min(positive), max(positive)))
    first, last = math.floor(low + 1e-9), math.ceil(high - 1e-9)
    last = max(last, first + 1)
    every = max(1, math.ceil((last - first) / 7))
    minor = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [digit * 10.0**power for power in range(first, last, every) for digit in minor]
    return Axis(label, 10.0**first, 10.0**last, (*ticks, 10.0**last), log=True)


def nice_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in _NICE_STEPS if step * power >= least * (1 - 1e-9))


def tick_text(value: float) -> str:
    """A tick's number, short: 0.001, 250, 1e-07."""
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.0e}"
    return f"{value:,.10g}"


def scatter(name: str, title: str, description: str, x: Axis, y: Axis, series: Sequence[Series]) -> Markup:
    """Plot points with their labels."""
    points = [(number, one, point) for number, one in enumerate(series) for point in one.points]
    marks = [_mark(_at(x, y, point), _look(number, one), point.hint, 6) for number, one, point in points]
    labels = _labels([(_at(x, y, point), point.label) for _, _, point in points if point.label])
    return _frame(name, title, description, x, y, (*marks, *labels))


def lines(name: str, title: str, description: str, x: Axis, y: Axis, series: Sequence[Series]) -> Markup:
    """Plot one line a series, with a dot at each value, and its label if it has one."""
    drawn = []
    labels = [(_at(x, y, point), point.label) for line_series in series for point in line_series.points if point.label]
    for number, line_series in enumerate(series):
        places = [_at(x, y, point) for point in line_series.points]
        path = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
        drawn.append(
            element("polyline", points=path, fill="none", stroke="currentColor", class_=f"line {_colour(number)}")
        )
        drawn += [
            _mark(place, _look(number, line_series), point.hint, 2.5)
            for place, point in zip(places, line_series.points, strict=True)
        ]
    return _frame(name, title, description, x, y, (*drawn, *_labels(labels)))


def columns(
    name: str, title: str, description: str, edges: Sequence[float], counts: Sequence[int], label: str
) -> Markup:
    """Plot counts between edges at equal ratios, as shares in percent; the first edge may be 0."""
    total = sum(counts) or 1
    shares = [100 * count / total for count in counts]
    y = linear_axis("tokens, %", [*shares, 0.0], from_zero=True)
    decades = [(place, edge) for place, edge in enumerate(edges) if edge > 0 and _is_decade(edge)]
    x = Axis(label, 0, len(counts), tuple(float(place) for place, _ in decades))
    bars = []
    for place, share in enumerate(shares):
        left, top = _place(x, y, place + 0.06, share)
        right, bottom = _place(x, y, place + 0.94, 0)
        hint = element("title", f"{edges[place]:.2g} to {edges[place + 1]:.2g}: {share:.2f} % of tokens")
        size = {"width": _number(right - left), "height": _number(bottom - top)}
        bars.append(element("rect", hint, x=_number(left), y=_number(top), class_="bar c0", **size))
    return _frame(name, title, description, x, y, bars, {float(place): tick_text(edge) for place, edge in decades})


def legend(series: Sequence[Series]) -> Markup:
    """Name the colours."""
    rows = [
        element("li", element("span", "", class_=f"swatch {_look(number, one)}"), one.name)
        for number, one in enumerate(series)
    ]
    return element("ul", *rows, class_="legend")


def _frame(
    name: str,
    title: str,
    description: str,
    x: Axis,
    y: Axis,
    drawn: Sequence[Markup],
    words: dict[float, str] | None = None,
) -> Markup:
    told = (element("title", title, id=f"{name}-title"), element("desc", description, id=f"{name}-desc"))
    axes = (*_x_axis(x, words), *_y_axis(y))
    return element(
        "svg",
        *told,
        *axes,
        *drawn,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
        xmlns="http://www.w3.org/2000/svg",
    )


def _x_axis(axis: Axis, words: dict[float, str] | None) -> Iterator[Markup]:
    bottom = HEIGHT - _BOTTOM
    for tick in axis.ticks:
        left = _number(_LEFT + axis.share(tick) * (WIDTH - _LEFT - _RIGHT))
        yield element("line", x1=left, x2=left, y1=_TOP, y2=bottom, stroke="currentColor", class_="grid")
        text = words[tick] if words else tick_text(tick)
        yield element("text", text, x=left, y=bottom + 18, text_anchor="middle", class_="tick")
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    yield element("text", axis.label, x=middle, y=HEIGHT - 8, text_anchor="middle", class_="axis")


def _y_axis(axis: Axis) -> Iterator[Markup]:
    for tick in axis.ticks:
        top = HEIGHT - _BOTTOM - axis.share(tick) * (HEIGHT - _TOP - _BOTTOM)
        yield element(
            "line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=_number(top), y2=_number(top), stroke="currentColor", class_="grid"
        )
        yield element("text", tick_text(tick), x=_LEFT - 8, y=_number(top + 4), text_anchor="end", class_="tick")
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    turned = f"rotate(-90 16 {middle:g})"
    yield element("text", axis.label, x=16, y=middle, text_anchor="middle", transform=turned, class_="axis")


def _mark(place: tuple[float, float], look: str, hint: str, radius: float) -> Markup:
    told = element("title", hint) if hint else None
    return element("circle", told, cx=_number(place[0]), cy=_number(place[1]), r=radius, class_=f"dot {look}")


def _labels(wanted: Sequence[tuple[tuple[float, float], str]]) -> list[Markup]:
    """Put labels beside their points, each below those that it would cover."""
    taken: list[tuple[float, float, float]] = []
    drawn = []
    for (left, top), text in sorted(wanted):
        width = len(text) * _LETTER_WIDTH
        flipped = left + 12 + width > WIDTH - _RIGHT
        start, height = (left - 12 - width if flipped else left + 12), top + 4
        while any(
            start < end and begin < start + width and abs(height - at) < _LABEL_HEIGHT for begin, end, at in taken
        ):
            height += _LABEL_HEIGHT
        taken.append((start, start + width, height))
        place = {"x": _number(left - 12 if flipped else start), "text_anchor": "end" if flipped else None}
        drawn.append(element("text", text, y=_number(height), class_="label", **place))
    return drawn


def _at(x: Axis, y: Axis, point: Point) -> tuple[float, float]:
    return _place(x, y, point.x, point.y)


def _place(x: Axis, y: Axis, across: float, up: float) -> tuple[float, float]:
    left = _LEFT + x.share(across) * (WIDTH - _LEFT - _RIGHT)
    return left, HEIGHT - _BOTTOM - y.share(up) * (HEIGHT - _TOP - _BOTTOM)


def _is_decade(value: float) -> bool:
    return math.isclose(math.log10(value), round(math.log10(value)), abs_tol=1e-3)


def _colour(number: int) -> str:
    return f"c{number % _COLOURS}"


def _look(number: int, series: Series) -> str:
    return f"{_colour(number)} hollow" if series.hollow else _colour(number)


def _number(value: float) -> str:
    return f"{value:.1f}"
