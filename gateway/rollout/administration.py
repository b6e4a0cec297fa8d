"""Rollouts as the admin port shows and steers them: through the state database, like `quantgate rollout`."""

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from config.errors import ConfigError
from gateway.deployment import Deployment
from gateway.rollout.machine import Event
from gateway.rollout.operating import Operator
from gateway.rollout.status import status_of
from serving.errors import StateAway
from serving.registry import Registry
from serving.state.database import StateDatabase
from serving.state.link import Link
from serving.state.rollout_records import RolloutSnapshot
from serving.state.rollouts import RolloutDatabase

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
    statuses: tuple[dict[str, Any], ...] = field(default=(), init=False)  # as of the last `refresh`
    # Apart, so that a command does not wait for a slow read.
    _reading: Link | None = field(default=None, init=False)
    _steering: Link | None = field(default=None, init=False)
    _read_at: float = field(default=0.0, init=False)

    async def __aenter__(self) -> Self:
        if self.state is not None:
            self._reading = Link(StateDatabase.at(self.state, create=False), READ_DEADLINE_SECONDS)
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
        now, recorded = self.wall_clock(), self.snapshot()
        if self._reading is None or not (recorded.aliases or recorded.active):
            self.statuses = ()
        elif now - self._read_at >= READ_SECONDS:
            self._read_at = now
            aliases = {record.alias: None for record in recorded.active}
            aliases |= {record.alias: None for record in recorded.aliases}
            with suppress(StateAway):
                self.statuses = await self._reading.call(self._read, [*aliases], now)

    async def steer(self, alias: str, command: Literal["pause", "resume", "promote", "abort"], reason: str) -> Any:
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
        state = await self._steering.call(operator.steer, alias, Event(command), reason)
        self._read_at = 0.0
        return {"alias": alias, "event": command, "phase": state.phase.value, "step": state.step}

    def _read(self, aliases: list[str], now: float) -> tuple[dict[str, Any], ...]:
        assert self._reading is not None
        database = RolloutDatabase(self._reading.database)
        records = [record for record in map(database.latest, aliases) if record is not None]
        described = [(record.active, status_of(database, record, now)) for record in records]
        return tuple([each for active, each in described if active or each["phase_seconds"] < ENDED_SECONDS])
