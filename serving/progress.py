"""Tells how the replicas of this machine start and stop, one line per change."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from serving.registry import Registry
from serving.replica import SUPERVISOR, ReplicaStatus, State


def progress_lines(before: Mapping[str, ReplicaStatus], now: Sequence[ReplicaStatus]) -> list[str]:
    """Describe the replicas whose state or reason has changed; failures are logged where they are handled."""
    ready = sum(status.state is State.READY for status in now)
    lines = []
    for status in now:
        known = before.get(status.replica.id)
        if known is not None and (known.state, known.reason) == (status.state, status.reason):
            continue
        if status.state is State.READY:
            lines.append(f"{status.replica.id}: ready at {status.replica.url} ({ready} of {len(now)} are ready)")
        elif status.state is not State.FAILED:
            lines.append(f"{status.replica.id}: {status.state}, {status.reason}")
    return lines


@dataclass(slots=True)
class StateChanges:
    """Calls `log` with a line for each change of a replica that this process runs, while the `with` block runs."""

    registry: Registry
    log: Callable[[str], None]
    _seen: dict[str, ReplicaStatus] = field(default_factory=dict)
    _observing: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        """Start with the present states."""
        self._observing.enter_context(self.registry.observed(self._look))
        self._look()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop observing."""
        self._observing.close()

    def _look(self) -> None:
        now = [status for status in self.registry.snapshot() if status.source == SUPERVISOR]
        lines = progress_lines(self._seen, now)
        self._seen = {status.replica.id: status for status in now}
        for line in lines:
            self.log(line)
