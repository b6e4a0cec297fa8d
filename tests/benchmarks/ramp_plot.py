"""A picture of a ramp against real engines by matplotlib (quantgate[plots]): users, precisions, first tokens."""

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tests.benchmarks.overhead.figures import percentile
from tests.benchmarks.ramp_vllm import BEST_FIRST, Seen

COLOURS = ("#0072b2", "#e69f00", "#d55e00")  # by Okabe and Ito: distinguishable without seeing colours
BIN_SECONDS = 2.5
INCHES = (7.0, 6.6)
DOTS_PER_INCH = 130


def write_climb(seen: Sequence[Seen], out: Path) -> None:
    """Draw how many users there were, who answered them, and when the first token came and was expected."""
    figure = Figure(figsize=INCHES, layout="constrained")
    load, precisions, waits = figure.subplots(3, 1, sharex=True)
    bins = _binned(seen)
    middles = [middle for middle, _ in bins]
    load.step(middles, [max(each.users for each in found) for _, found in bins], where="mid", color="black", lw=1.4)
    load.set_ylabel("users at a time")
    load.set_ylim(bottom=0)
    stacked = [[sum(each.precision == name for each in found) / len(found) for _, found in bins] for name in BEST_FIRST]
    precisions.stackplot(middles, stacked, labels=BEST_FIRST, colors=COLOURS, alpha=0.85)
    precisions.set_ylabel("answered by")
    precisions.set_ylim(0, 1)
    for name, colour in zip(BEST_FIRST, COLOURS, strict=True):
        own = [each for each in seen if each.precision == name]
        waits.scatter([each.asked_at for each in own], [each.first_seconds for each in own], s=7, color=colour)
    waits.plot(middles, [percentile([each.first_seconds for each in found], 95) for _, found in bins], "k", label="p95")
    known = [(middle, [each.expected_seconds for each in found if each.expected_seconds]) for middle, found in bins]
    expected = [(middle, percentile(found, 95)) for middle, found in known if found]
    waits.plot([middle for middle, _ in expected], [each for _, each in expected], "k:", label="p95 as expected")
    waits.set_yscale("log")
    waits.set_ylabel("to first token, s")
    waits.set_xlabel("seconds")
    for axes in (precisions, waits):
        axes.legend(edgecolor="none", framealpha=0.7, fontsize=8, loc="upper left")
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        figure.savefig(draft, format="png", dpi=DOTS_PER_INCH)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def _binned(seen: Sequence[Seen]) -> list[tuple[float, list[Seen]]]:
    """Requests by when they were asked, at the middles of their bins; empty ones left out."""
    bins: dict[int, list[Seen]] = {}
    for each in seen:
        bins.setdefault(int(each.asked_at // BIN_SECONDS), []).append(each)
    return [((number + 0.5) * BIN_SECONDS, bins[number]) for number in sorted(bins)]
