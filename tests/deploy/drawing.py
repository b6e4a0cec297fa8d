"""Draws panels of a dashboard with matplotlib, from the results of their own queries.

Title, unit, thresholds, colours of states, stacking and place are those of the panel; Grafana may show details
differently.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from tests.deploy.prometheus import Series

# By query: its legend, and its series.
Results = list[tuple[str, Series]]

CELL_WIDTH, CELL_HEIGHT, GAP = 0.46, 0.30, 0.08  # inches: of a cell of the grid, and between panels
BACKGROUND, PANEL, TEXT, FAINT = "#111217", "#181b1f", "#d0d1d7", "#44474f"
PALETTE = ("#73bf69", "#f2cc0c", "#5794f2", "#ff780a", "#b877d9", "#ff7383", "#37c8c4", "#c4a57b", "#8f8bd8", "#b7dbab")
COLORS = {
    "green": "#73bf69",
    "yellow": "#fade2a",
    "orange": "#ff9830",
    "red": "#f2495c",
    "blue": "#5794f2",
    "light-blue": "#8ab8ff",
    "transparent": PANEL,
}
LEGEND_LINES = 2


@dataclass(frozen=True, slots=True)
class Picture:
    """Panels, their results by id, and the time that they show."""

    panels: list[dict[str, Any]]
    results: Mapping[int, Results]
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Line:
    """One series: its name, and its values by seconds since the start; NaN where there is none."""

    name: str
    seconds: list[float]
    values: list[float]

    @property
    def last(self) -> float:
        """The last number."""
        return next((value for value in reversed(self.values) if math.isfinite(value)), math.nan)


def draw(picture: Picture, path: Path) -> None:
    """Write a PNG file."""
    tops = place(picture.panels)
    height = max(tops[panel["id"]] + panel["gridPos"]["h"] for panel in picture.panels)
    figure = Figure(figsize=(24 * CELL_WIDTH, height * CELL_HEIGHT), facecolor=BACKGROUND, dpi=100)
    FigureCanvasAgg(figure)
    with mpl.rc_context({"font.size": 7.5, "text.color": TEXT, "axes.labelcolor": TEXT, "font.family": "DejaVu Sans"}):
        for panel in picture.panels:
            box = dict(panel["gridPos"], y=tops[panel["id"]])
            _panel(figure, box, height, panel, lines_of(picture, panel))
        drawn = BytesIO()
        figure.savefig(drawn)
    # A palette that keeps every hue: a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path)


def place(panels: Sequence[dict[str, Any]]) -> dict[int, int]:
    """The top of each panel in the grid, without the rows of the dashboard that are left out."""
    tops: dict[int, int] = {}
    used = 0
    for top in sorted({panel["gridPos"]["y"] for panel in panels}):
        row = [panel for panel in panels if panel["gridPos"]["y"] == top]
        tops |= {panel["id"]: used for panel in row}
        used += max(panel["gridPos"]["h"] for panel in row)
    return tops


def lines_of(picture: Picture, panel: dict[str, Any]) -> list[Line]:
    """The series of a panel on a common axis of whole seconds."""
    seconds = [float(second) for second in range(int(picture.end - picture.start) + 1)]
    found = []
    for legend, series in picture.results[panel["id"]]:
        for each in series:
            values = {round(at - picture.start): float(value) for at, value in each["values"]}
            found.append(
                Line(named(legend, each["metric"]), seconds, [values.get(int(at), math.nan) for at in seconds])
            )
    return found


def named(legend: str, labels: Mapping[str, str]) -> str:
    """Fill labels into a legend."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), legend)


def _panel(figure: Figure, box: Mapping[str, int], rows: int, panel: dict[str, Any], lines: list[Line]) -> None:
    width, height = 24 * CELL_WIDTH, rows * CELL_HEIGHT
    left, right = box["x"] * CELL_WIDTH + GAP / 2, (box["x"] + box["w"]) * CELL_WIDTH - GAP / 2
    top, bottom = height - box["y"] * CELL_HEIGHT - GAP / 2, height - (box["y"] + box["h"]) * CELL_HEIGHT + GAP / 2
    if panel["type"] == "row":
        figure.text(left / width, bottom / height, panel["title"], fontsize=10, fontweight="bold", va="bottom")
        return
    frame = figure.add_axes((left / width, bottom / height, (right - left) / width, (top - bottom) / height))
    frame.set(facecolor=PANEL, xticks=(), yticks=())
    for spine in frame.spines.values():
        spine.set_color(FAINT)
    inches = (right - left, top - bottom)
    frame.text(0.1 / inches[0], 1 - 0.08 / inches[1], panel["title"], va="top", fontsize=8, transform=frame.transAxes)
    draw_type = DRAWN[panel["type"]]
    # Space inside of the frame: for the title, the labels of the axes, and the legend.
    margins = {"stat": (0.1, 0.05, 0.3), "timeseries": (0.72, 0.52, 0.32), "state-timeline": (1.6, 0.52, 0.32)}
    side, below, above = margins[panel["type"]]
    inner = (
        *((left + side) / width, (bottom + below) / height),
        *((right - left - side - 0.15) / width, (top - bottom - below - above) / height),
    )
    axes = figure.add_axes(inner)
    axes.set_facecolor(PANEL)
    axes.tick_params(colors=TEXT, labelsize=7, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    draw_type(axes, panel, lines)


def _stat(axes: Axes, panel: dict[str, Any], lines: list[Line]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    axes.axis("off")
    for number, line in enumerate(lines or [Line("", [0.0], [math.nan])]):
        value = line.last
        passed = [step for step in defaults["thresholds"]["steps"] if step["value"] is None or value >= step["value"]]
        color = COLORS.get((passed or defaults["thresholds"]["steps"])[-1]["color"], TEXT)
        text = "none" if math.isnan(value) else formatted(value, defaults["unit"])
        at = (number + 0.5) / max(len(lines), 1)
        text_of: dict[str, Any] = {"ha": "center", "va": "center", "transform": axes.transAxes, "color": color}
        axes.text(at, 0.62, text, fontsize=12.5, fontweight="bold", **text_of)
        if line.name not in ("", "value"):
            axes.text(at, 0.12, line.name, fontsize=7, **{**text_of, "color": TEXT})
        elif any(map(math.isfinite, line.values)):
            axes.fill_between(line.seconds, line.values, color=color, alpha=0.25, linewidth=0)
            highest = max(value for value in line.values if math.isfinite(value))
            axes.set_ylim(0, max(highest, 1e-9) * 3.2)
            axes.set_xlim(line.seconds[0], line.seconds[-1])


def _graph(axes: Axes, panel: dict[str, Any], lines: list[Line]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    custom, unit = defaults["custom"], defaults["unit"]
    lines = sorted(lines, key=lambda line: line.name)
    colors = dict(zip([line.name for line in lines], PALETTE * 3, strict=False))
    known = [value for line in lines for value in line.values if math.isfinite(value)]
    least = defaults.get("min", min([custom.get("axisSoftMin", 0.0), *known]))
    if custom["stacking"]["mode"] == "none":
        for line in lines:
            axes.plot(line.seconds, line.values, color=colors[line.name], linewidth=1.1)
            axes.fill_between(line.seconds, line.values, least, color=colors[line.name], alpha=0.06, linewidth=0)
    elif lines:
        values = [[value if math.isfinite(value) else 0.0 for value in line.values] for line in lines]
        axes.stackplot(lines[0].seconds, values, colors=[colors[line.name] for line in lines], alpha=0.7, linewidth=0)
    if custom.get("thresholdsStyle", {}).get("mode") == "dashed":
        axes.axhline(defaults["thresholds"]["steps"][-1]["value"], color=COLORS["red"], linewidth=1, linestyle="--")
    axes.set_ylim(bottom=least)
    if "max" in defaults:
        axes.set_ylim(top=defaults["max"])
    elif not any(known):
        axes.set_ylim(top=least + 1)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatted(value, unit)))
    _time_axis(axes, lines)
    seen = sorted(lines, key=lambda line: -max((v for v in line.values if math.isfinite(v)), default=0))
    _legend(axes, {line.name: colors[line.name] for line in seen if line.name})


def _timeline(axes: Axes, panel: dict[str, Any], lines: list[Line]) -> None:
    names = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    lines = sorted(lines, key=lambda line: line.name, reverse=True)
    used = set()
    for row, line in enumerate(lines):
        for at, value in zip(line.seconds, line.values, strict=True):
            if math.isfinite(value):
                state = names[f"{value:.0f}"]
                used.add(state["text"])
                axes.broken_barh([(at, 1.0)], (row - 0.4, 0.8), color=COLORS.get(state["color"], state["color"]))
    axes.set_yticks(range(len(lines)), [line.name for line in lines])
    axes.set_ylim(-0.6, max(len(lines), 1) - 0.4)
    _time_axis(axes, lines)
    shown = {state["text"]: COLORS.get(state["color"], state["color"]) for state in names.values()}
    _legend(axes, {text: color for text, color in shown.items() if text in used})


def _time_axis(axes: Axes, lines: Sequence[Line]) -> None:
    if lines:
        axes.set_xlim(lines[0].seconds[0], lines[0].seconds[-1])
    axes.grid(visible=True, color=FAINT, linewidth=0.4)
    axes.set_axisbelow(b=True)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 1.5, 3, 6]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{int(value) // 60}:{int(value) % 60:02}"))


def _legend(axes: Axes, colors: Mapping[str, str]) -> None:
    """Two lines of names, the largest series first; those that have no room are left out."""
    place, figure = axes.get_position(), axes.get_figure(root=True)
    assert figure is not None
    inches = place.width * figure.get_figwidth(), place.height * figure.get_figheight()
    columns = max(int(inches[0] / (0.33 + 0.062 * max(map(len, colors), default=1))), 1)
    handles = [Patch(color=color, label=name) for name, color in colors.items()][: LEGEND_LINES * columns]
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(-0.15 / inches[0], -0.22 / inches[1]),
        ncols=columns,
        fontsize=6.5,
        frameon=False,
        labelcolor=TEXT,
        handlelength=0.9,
        handleheight=0.5,
        columnspacing=1.0,
        borderaxespad=0,
    )


DRAWN = MappingProxyType({"stat": _stat, "timeseries": _graph, "state-timeline": _timeline})


def formatted(value: float, unit: str) -> str:
    """A number as Grafana writes it."""
    if unit == "percentunit":
        return f"{value * 100:.3g}%"
    if unit == "s":
        return f"{value * 1000:.3g} ms" if abs(value) < 1 and value else f"{value:.3g} s"
    if unit == "bytes":
        power = min(int(math.log(max(value, 1), 1024)), 4)
        return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
    number = f"{value / 1000:.3g}K" if value >= 1000 else f"{value:.3g}"
    return number + {"reqps": " req/s", "cps": "/s", "short": ""}.get(unit, unit.removeprefix("suffix:"))
