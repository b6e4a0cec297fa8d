"""The latest errors that clients were answered with, for the status."""

from collections import OrderedDict
from collections.abc import Callable
from time import time

from gateway.status.values import ErrorStatus

MAX_ERRORS = 50
MAX_MESSAGE_CHARACTERS = 300


class RecentErrors:
    """Keeps the latest error of each alias, code and replica, at most `limit`; others of the same kind are counted.

    So a flood of one kind of error does not push out the others.
    """

    def __init__(self, limit: int = MAX_ERRORS, wall_clock: Callable[[], float] = time) -> None:
        self._limit = limit
        self._wall_clock = wall_clock
        self._errors: OrderedDict[tuple[str, str, str], ErrorStatus] = OrderedDict()

    def add(self, alias: str, code: str, replica: str, request_id: str, message: str) -> None:
        """Keep an error."""
        key = alias, code, replica
        known = self._errors.pop(key, None)
        count = 1 if known is None else known.count + 1
        text = message if len(message) <= MAX_MESSAGE_CHARACTERS else f"{message[: MAX_MESSAGE_CHARACTERS - 3]}..."
        self._errors[key] = ErrorStatus(self._wall_clock(), alias, code, replica, request_id, text, count)
        if len(self._errors) > self._limit:
            self._errors.popitem(last=False)

    def latest(self) -> tuple[ErrorStatus, ...]:
        """The errors, newest first."""
        return tuple(reversed(self._errors.values()))
