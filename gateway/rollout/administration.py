"""Rollouts as the admin port shows and steers them: through the state database, like `quantgate rollout`."""

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from config.errors import ConfigError
from gateway.deployment import Deployment
from gateway.rollout.machine import ANY, Event, Preconditions
from gateway.rollout.operating import Operator
from gateway.rollout.record import UnreadableRecord, read_state
from gateway.rollout.status import RolloutReader, unreadable_status
from serving.errors import StateAway
from serving.registry import Registry
from serving.state.database import StateDatabase
from serving.state.link import Link
from serving.state.rollout_records import RolloutRecord, RolloutSnapshot
from serving.state.rollouts import RolloutDatabase

log = logging.getLogger(__name__)

READ_SECONDS = 2.0
# A status waits no longer for the rollouts.
READ_DEADLINE_SECONDS = 2.0
# A rollout that has ended is shown for so long.
ENDED_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class GatewayOperator(Operator):
    """An operator that looks at replicas through the registry of its gateway: `ready` are variants."""

    ready: frozenset[str] = frozenset()

    def is_ready(self, variant: str) -> bool:
        """Whether a variant has a ready replica."""
        return variant in self.ready


@dataclass(slots=True, eq=False)
class RolloutAdministration:
    """Reads and steers rollouts while the `async with` block runs; `state` None: there is no state database."""

    state: str | None
    deployment: Callable[[], Deployment]
    snapshot: Callable[[], RolloutSnapshot]
    registry: Registry
    wall_clock: Callable[[], float] = time.time
    clock: Callable[[], float] = time.monotonic
    statuses: tuple[dict[str, Any], ...] = field(default=(), init=False)  # as of the last `refresh`
    # Apart, so that a command does not wait for a slow read.
    _reading: Link | None = field(default=None, init=False)
    _steering: Link | None = field(default=None, init=False)
    _reader: RolloutReader | None = field(default=None, init=False)
    _read_at: float = field(default=float("-inf"), init=False)
    _away: bool = field(default=False, init=False)
    _unreadable: set[str] = field(default_factory=set, init=False)  # those that the log names already

    async def __aenter__(self) -> Self:
        if self.state is not None:
            self._reading = Link(StateDatabase.at(self.state, create=False), READ_DEADLINE_SECONDS)
            self._reader = RolloutReader(RolloutDatabase(self._reading.database))
            self._steering = Link(StateDatabase.at(self.state, create=False))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for link in (self._reading, self._steering):
            if link is not None:
                link.close()

    async def refresh(self) -> None:
        """Read the rollouts again, at most every READ_SECONDS; while the database is away, the last ones stay."""
        now, recorded = self.clock(), self.snapshot()
        if self._reading is None or not (recorded.aliases or recorded.active):
            self.statuses = ()
        elif now - self._read_at >= READ_SECONDS:
            self._read_at = now
            aliases = {record.alias: None for record in recorded.active}
            aliases |= {record.alias: None for record in recorded.aliases}
            try:
                self.statuses = await self._reading.call(self._read, [*aliases], self.wall_clock())
                self._away = False
            except StateAway as away:
                if not self._away:
                    log.warning("%s; rollouts are shown as they were read last", away)
                self._away = True

    async def steer(
        self,
        alias: str,
        command: Literal["pause", "resume", "promote", "abort"],
        reason: str,
        preconditions: Preconditions = ANY,
    ) -> Any:
        """Apply a command to the active rollout of an alias, and describe its state; errors are Operator.steer's."""
        if self._steering is None:
            raise ConfigError("gateway.state is not set; rollouts are recorded there")
        operator = GatewayOperator(
            self.deployment(),
            RolloutDatabase(self._steering.database),
            f"admin@{socket.gethostname()}",
            self.wall_clock,
            frozenset(self.registry.ready),
        )
        state = await self._steering.call(operator.steer, alias, Event(command), reason, preconditions)
        self._read_at = float("-inf")
        return {"alias": alias, "event": command, "phase": state.phase.value, "step": state.step}

    def _read(self, aliases: list[str], now: float) -> tuple[dict[str, Any], ...]:
        assert self._reader is not None
        latest = map(self._reader.database.latest, aliases)
        records = [record for record in latest if record is not None and is_shown(record, now)]
        self._reader.keep({record.id for record in records})
        return tuple([self._describe(self._reader, record, now) for record in records])

    def _describe(self, reader: RolloutReader, record: RolloutRecord, now: float) -> dict[str, Any]:
        try:
            return reader.status(record, now)
        except UnreadableRecord as error:
            if record.id not in self._unreadable:
                self._unreadable.add(record.id)
                log.warning("rollout %s of %s cannot be described: %s", record.id, record.alias, error)
            return unreadable_status(record, error)


def is_shown(record: RolloutRecord, now: float) -> bool:
    """Whether a rollout is active, or has ended within ENDED_SECONDS; of an unreadable one its end is not known."""
    if record.active:
        return True
    try:
        return now - read_state(record).since < ENDED_SECONDS
    except UnreadableRecord:
        return False
