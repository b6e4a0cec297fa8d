"""Latency against throughput as a PNG (matplotlib, quantgate[plots]): a row per machine, a line per variant."""

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from config.capacity import Percentiles
from config.curves import Curve, LoadPoint

# Colours by Okabe and Ito; markers distinguish lines without colour, too.
LOOKS = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#9a4d8e", "D"), ("#b58900", "v"), ("#444c56", "P"))
PANEL_INCHES = (6.2, 4.4)
DOTS_PER_INCH = 130
MILLISECONDS = 1e3

_Latency = Callable[[LoadPoint], Percentiles]
PANELS: tuple[tuple[str, bool, _Latency], ...] = (
    ("time to first token, ms (logarithmic)", True, lambda point: point.first_token),
    ("time from token to token, ms", False, lambda point: point.next_token),
)


def write_plot(machines: Mapping[str, Sequence[Curve]], out: Path) -> None:
    """Draw all machines into one picture, and write it atomically."""
    width, height = PANEL_INCHES
    figure = Figure(figsize=(len(PANELS) * width, len(machines) * height), layout="constrained")
    rows = figure.subfigures(len(machines), 1, squeeze=False)[:, 0]
    for row, (machine, curves) in zip(rows, machines.items(), strict=True):
        row.suptitle(f"Latency against throughput on {machine}", fontsize=13)
        axes = row.subplots(1, len(PANELS))
        for panel, (label, logarithmic, latency) in zip(axes, PANELS, strict=True):
            _draw(panel, curves, latency)
            _label(panel, label, logarithmic=logarithmic)
        row.legend(handles=_legend(curves), loc="outside lower center", ncols=2, frameon=False)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        figure.savefig(draft, format="png", dpi=DOTS_PER_INCH)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def _draw(panel: Axes, curves: Sequence[Curve], latency: _Latency) -> None:
    for number, curve in enumerate(curves):
        colour, marker = LOOKS[number % len(LOOKS)]
        across = [point.tokens_per_second for point in curve.points]
        medians = [latency(point).p50 * MILLISECONDS for point in curve.points]
        rare = [latency(point).p95 * MILLISECONDS for point in curve.points]
        panel.plot(across, medians, color=colour, marker=marker)
        panel.plot(across, rare, color=colour, linestyle=":", linewidth=1.2, marker=marker, markersize=3.5)
        for point, x, y in zip(curve.points, across, medians, strict=True):
            style: dict[str, Any] = {"xytext": (0, -15), "textcoords": "offset points", "ha": "center"}
            panel.annotate(str(point.concurrency), (x, y), color=colour, fontsize=9, **style)


def _label(panel: Axes, label: str, *, logarithmic: bool) -> None:
    panel.set_xlabel("answers of all requests together, tokens/s")
    panel.set_ylabel(label)
    panel.set_xlim(left=0)
    if logarithmic:
        panel.set_yscale("log")
        low, high = panel.get_ylim()
        # At least a factor of ten: on a shorter logarithmic axis hardly any tick would be left.
        panel.set_ylim(min(low / 1.4, high / 10), high)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
        panel.yaxis.set_minor_locator(NullLocator())
    else:
        panel.set_ylim(bottom=0)
    panel.grid(visible=True, which="major", alpha=0.3)


def _legend(curves: Sequence[Curve]) -> list[Line2D]:
    lines = [
        Line2D([], [], color=colour, marker=marker, label=curve.name)
        for curve, (colour, marker) in zip(curves, cycle(LOOKS), strict=False)
    ]
    grey = "#444c56"
    key = [
        Line2D([], [], color=grey, label="median"),
        Line2D([], [], color=grey, linestyle=":", label="95th percentile"),
        Line2D([], [], color=grey, linestyle="", marker="$16$", markersize=11, label="requests at a time"),
    ]
    return lines + key
