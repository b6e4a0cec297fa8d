"""Tell a replica that hangs: it has requests, and nothing has come of them for too long."""

from dataclasses import dataclass

from serving.probe import Activity


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
