"""Pictures of runs by matplotlib (quantgate[plots]): load, precisions and waits on one axis of time."""

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.benchmarks.overhead.figures import percentile
from tests.benchmarks.routing.figures import Objective, shares, wait_seconds
from tests.benchmarks.routing.runs import Outcome, Run
from tests.benchmarks.routing.workloads import Rate

COLOURS = ("#0072b2", "#e69f00", "#d55e00")  # by Okabe and Ito: distinguishable without seeing colours
BIN_SECONDS = 10.0
PANEL_INCHES = (5.6, 2.3)
DOTS_PER_INCH = 130


def write_ramp(runs: Sequence[Run], rate: Rate, capacity: float, objective: Objective, out: Path) -> None:
    """Draw runs side by side: offered load above, then the share of each precision, then times to the first token."""
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * len(runs), height * 3), layout="constrained")
    rows = figure.subplots(3, len(runs), sharex=True, sharey="row", squeeze=False)
    for column, run in enumerate(runs):
        load, precisions, waits = (row[column] for row in rows)
        load.set_title(run.policy)
        _draw_load(load, run, rate, capacity)
        _draw_shares(precisions, run)
        _draw_waits(waits, run, objective)
        waits.set_xlabel("seconds")
        if not column:
            load.set_ylabel("turns asked / s")
            precisions.set_ylabel("answered by")
            waits.set_ylabel("to first token, s")
            for axes in (load, precisions, waits):
                axes.legend(edgecolor="none", framealpha=0.7, fontsize=8, loc="upper left")
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        figure.savefig(draft, format="png", dpi=DOTS_PER_INCH)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def _binned(run: Run) -> list[tuple[float, list[Outcome]]]:
    """Turns by when they were asked, at the middles of their bins."""
    bins: list[list[Outcome]] = [[] for _ in range(int(run.scenario.seconds // BIN_SECONDS))]
    for outcome in run.outcomes:
        number = int(outcome.asked_at // BIN_SECONDS)
        if number < len(bins):
            bins[number].append(outcome)
    return [((number + 0.5) * BIN_SECONDS, found) for number, found in enumerate(bins)]


def _draw_load(axes: Axes, run: Run, rate: Rate, capacity: float) -> None:
    middles = [middle for middle, _ in _binned(run)]
    axes.step(middles, [len(found) / BIN_SECONDS for _, found in _binned(run)], where="mid", color="#999999", lw=0.9)
    axes.plot(middles, [rate(middle) for middle in middles], color="black", lw=1.4, label="offered, mean")
    axes.axhline(capacity, color="#009e73", linestyle="--", lw=1.0, label="capacity of the best rung")
    axes.set_ylim(bottom=0)


def _draw_shares(axes: Axes, run: Run) -> None:
    rungs = run.scenario.fleet.rungs
    begun = [(middle, [each for each in found if each.first_at is not None]) for middle, found in _binned(run)]
    found = [(middle, shares(outcomes, rungs)) for middle, outcomes in begun if outcomes]
    stacked = [[each[rung] for _, each in found] for rung in rungs]
    axes.stackplot([middle for middle, _ in found], stacked, labels=rungs, colors=COLOURS, alpha=0.85)
    axes.set_ylim(0, 1)


def _draw_waits(axes: Axes, run: Run, objective: Objective) -> None:
    begun = [
        (middle, [wait_seconds(each) for each in found if each.first_at is not None]) for middle, found in _binned(run)
    ]
    found = [(middle, waits) for middle, waits in begun if waits]
    for percent, colour in ((50, COLOURS[0]), (95, COLOURS[2])):
        label = f"p{percent}"
        middles = [middle for middle, _ in found]
        axes.plot(middles, [percentile(waits, percent) for _, waits in found], color=colour, label=label)
    axes.axhline(objective.first_token_seconds, color="#444444", linestyle=":", lw=1.0, label="objective")
    axes.set_yscale("log")
