"""Charts of the HTML report, drawn by matplotlib as inline SVG.

Values in, markup out: equal charts give equal bytes. A page with several charts needs a unique `name` for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import BboxBase

from quantize.report.svg import COLORS, HOLLOW, RULE, TEXT, inline_svg

SIZE_INCHES = (10.0, 5.2)
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"))
LABEL_POINTS = 9
LABEL_OFFSET_POINTS = 9
SMALLEST_DECADE = 10.0


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis with the unit in its label; `zero` includes 0, which a logarithmic axis cannot."""

    label: str
    log: bool = False
    zero: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """A value pair, with an optional label beside it."""

    x: float
    y: float
    label: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one colour and marker; hollow ones differ without the colour."""

    name: str
    points: tuple[Point, ...]
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Series over two axes; `description` is the text alternative."""

    title: str
    description: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    kind: Literal["points", "lines"] = "points"


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts[i]` values between `edges[i]` and `edges[i + 1]`; edges grow by a constant factor, the first may be 0."""

    title: str
    description: str
    label: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """The name of a series with its marker as a character and its colour as a CSS class."""

    name: str
    marker: str
    color_class: str


def chart_svg(name: str, chart: Chart) -> Markup:
    """Draw a chart; `name` prefixes the ids in the markup."""
    figure, axes = _figure()
    for number, series in enumerate(chart.series):
        _draw_series(axes, number, series, line=chart.kind == "lines")
    _set_scale(axes, chart.x, "x", [point.x for series in chart.series for point in series.points])
    _set_scale(axes, chart.y, "y", [point.y for series in chart.series for point in series.points])
    labels = [
        _label(axes, point, below=chart.kind == "lines")
        for series in chart.series
        for point in series.points
        if point.label
    ]
    _separate(figure, labels)
    return inline_svg(figure, name, chart.title, chart.description)


def histogram_svg(name: str, histogram: Histogram) -> Markup:
    """Draw the share of each bin in percent; bins are equally wide, decades are marked."""
    figure, axes = _figure()
    total = sum(histogram.counts) or 1
    shares = [100 * count / total for count in histogram.counts]
    axes.bar(range(len(shares)), shares, width=0.88, align="edge", color=COLORS[0], linewidth=0, clip_on=False)
    decades = [(index, edge) for index, edge in enumerate(histogram.edges) if edge > 0 and _is_decade(edge)]
    axes.set_xticks([index for index, _ in decades], [tick_text(edge) for _, edge in decades])
    axes.set_xlabel(histogram.label, parse_math=False)
    axes.set_ylabel("tokens, %")
    axes.set_ylim(bottom=0, top=None if any(shares) else 1)
    return inline_svg(figure, name, histogram.title, histogram.description)


def legend(chart: Chart) -> tuple[LegendEntry, ...]:
    """The legend of a chart, for the page; empty for a single series."""
    if len(chart.series) < 2:
        return ()
    return tuple(
        LegendEntry(series.name, "○" if series.hollow else _marker(number)[1], f"c{number % len(COLORS)}")
        for number, series in enumerate(chart.series)
    )


def tick_text(value: float) -> str:
    """Format a tick: 0.001, 250, 1e-07."""
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.0e}"
    return f"{value:,.10g}"


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.patch.set_visible(False)
    axes.grid(visible=True, color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=TEXT)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(TEXT)
    return figure, axes


def _draw_series(axes: Axes, number: int, series: Series, *, line: bool) -> None:
    color = COLORS[number % len(COLORS)]
    axes.plot(
        [point.x for point in series.points],
        [point.y for point in series.points],
        color=color,
        linestyle="-" if line else "",
        linewidth=1.6,
        marker="o" if series.hollow else _marker(number)[0],
        markersize=4 if line else 8,
        markerfacecolor=HOLLOW if series.hollow else color,
        markeredgewidth=2 if series.hollow else 0,
        clip_on=False,
    )


def _set_scale(axes: Axes, axis: Axis, which: Literal["x", "y"], values: Sequence[float]) -> None:
    ruler = axes.xaxis if which == "x" else axes.yaxis
    set_limits = axes.set_xlim if which == "x" else axes.set_ylim
    axes.set(**{f"{which}label": axis.label})
    ruler.label.set_parse_math(False)
    if axis.log:
        axes.set(**{f"{which}scale": "log"})
        low, high = min(values, default=1.0), max(values, default=1.0)
        if high < low * SMALLEST_DECADE:  # a shorter logarithmic axis has hardly any tick
            set_limits(low / SMALLEST_DECADE**0.5, high * SMALLEST_DECADE**0.5)
        ruler.set_major_locator(LogLocator(subs=(1, 2, 5) if high < low * SMALLEST_DECADE**2 else (1,)))
        ruler.set_minor_locator(NullLocator())
    elif axis.zero:
        set_limits(0, max(values, default=0) * 1.05 or 1)
    ruler.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))


def _label(axes: Axes, point: Point, *, below: bool) -> Annotation:
    label = axes.annotate(
        point.label,
        (point.x, point.y),
        xytext=(0, -LABEL_OFFSET_POINTS) if below else (LABEL_OFFSET_POINTS, 0),
        textcoords="offset points",
        ha="center" if below else "left",
        va="center",
        fontsize=LABEL_POINTS,
        color=TEXT,
        parse_math=False,
        annotation_clip=False,
    )
    label.set_in_layout(False)
    return label


def _separate(figure: Figure, labels: Sequence[Annotation]) -> None:
    """Move labels left of their point where they would leave the figure, and down where they would overlap."""
    figure.draw_without_rendering()  # computes the layout, which extents depend on
    placed: list[BboxBase] = []
    for label in sorted(labels, key=lambda label: (*label.xy, label.get_text())):
        if label.get_window_extent().x1 > figure.bbox.x1:
            label.set_horizontalalignment("right")
            label.xyann = (-LABEL_OFFSET_POINTS, 0)
        while any(label.get_window_extent().overlaps(other) for other in placed):
            label.xyann = (label.xyann[0], label.xyann[1] - LABEL_POINTS / 2)
        placed.append(label.get_window_extent())


def _marker(number: int) -> tuple[str, str]:
    return MARKERS[number % len(MARKERS)]


def _is_decade(value: float) -> bool:
    return f"{value:.2e}".startswith("1.00e")
