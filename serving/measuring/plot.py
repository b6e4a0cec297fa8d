"""Latency against throughput as a PNG, by matplotlib (quantgate[plots]): a row for each machine, a line a variant."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from config.capacity import Percentiles
from config.curves import Curve, Stop

# Distinguishable without seeing colours, too: each line has a marker of its own (colours by Okabe and Ito).
LOOKS = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#9a4d8e", "D"), ("#b58900", "v"), ("#444c56", "P"))
PANEL_INCHES = (6.2, 4.4)
DOTS_PER_INCH = 130
MILLISECONDS = 1e3

_Latency = Callable[[Stop], Percentiles]
PANELS: tuple[tuple[str, _Latency], ...] = (
    ("time to first token, ms", lambda stop: stop.first_token),
    ("time between tokens, ms", lambda stop: stop.next_token),
)


def write_plot(machines: Mapping[str, Sequence[Curve]], out: Path) -> None:
    """Draw all machines into one picture; it replaces an older one at once."""
    width, height = PANEL_INCHES
    figure = Figure(figsize=(len(PANELS) * width, len(machines) * height), layout="constrained")
    rows = figure.subfigures(len(machines), 1, squeeze=False)[:, 0]
    for row, (machine, curves) in zip(rows, machines.items(), strict=True):
        row.suptitle(f"{machine}", fontsize=12)
        axes = row.subplots(1, len(PANELS))
        for panel, (label, latency) in zip(axes, PANELS, strict=True):
            _draw(panel, curves, label, latency)
        handles, names = axes[0].get_legend_handles_labels()
        row.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3), frameon=False)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        figure.savefig(draft, format="png", dpi=DOTS_PER_INCH)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def _draw(panel: Axes, curves: Sequence[Curve], label: str, latency: _Latency) -> None:
    for number, curve in enumerate(curves):
        colour, marker = LOOKS[number % len(LOOKS)]
        across = [stop.tokens_per_second for stop in curve.stops]
        medians = [latency(stop).p50 * MILLISECONDS for stop in curve.stops]
        rare = [latency(stop).p95 * MILLISECONDS for stop in curve.stops]
        panel.plot(across, medians, color=colour, marker=marker, label=f"{curve.name}: median")
        panel.plot(across, rare, color=colour, linestyle=":", linewidth=1, marker=marker, markersize=3, alpha=0.75)
        for stop, x, y in zip(curve.stops, across, medians, strict=True):
            panel.annotate(
                str(stop.concurrency), (x, y), (0, 7), textcoords="offset points", ha="center", color=colour, fontsize=9
            )
    panel.set_xlabel(
        "tokens/s, all requests together (numbers: requests at a time; dotted: 95th percentile)", fontsize=9
    )
    panel.set_ylabel(label)
    panel.set_yscale("log")
    panel.set_xlim(left=0)
    panel.grid(visible=True, which="both", alpha=0.25)
