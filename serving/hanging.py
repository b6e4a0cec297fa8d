"""Watches a replica for hanging: it has requests, and nothing has come of them for too long."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from serving.errors import ProbeFailed
from serving.probe import Activity, Probe
from serving.replica import Replica

LONGEST_LOOK_SECONDS = 5.0  # between two looks at how an engine gets on


@dataclass(frozen=True, slots=True)
class Progress:
    """When an engine last was seen to work or to have nothing to do."""

    at_seconds: float
    tokens: float | None = None


def observe(progress: Progress, now_seconds: float, activity: Activity | None) -> Progress:
    """Take a look at an engine into account; an activity of None is a look that got no answer."""
    if activity is None:
        return progress
    if activity.requests > 0 and activity.tokens == progress.tokens:
        return progress
    return Progress(now_seconds, activity.tokens)


async def until_it_hangs(replica: Replica, probe: Probe, limit_seconds: float, clock: Callable[[], float]) -> str:
    """Return, and say so, when nothing has come of a replica's requests for too long; never where the limit is 0."""
    if not limit_seconds:
        await asyncio.Event().wait()
    progress = Progress(clock())
    while True:
        await asyncio.sleep(min(LONGEST_LOOK_SECONDS, limit_seconds / 4))
        progress = observe(progress, clock(), await _activity(replica, probe))
        if clock() - progress.at_seconds > limit_seconds:
            return f"hangs: it has requests, and no token came for {limit_seconds:g} s"


async def _activity(replica: Replica, probe: Probe) -> Activity | None:
    try:
        return await probe.activity(replica)
    except ProbeFailed:
        return None
