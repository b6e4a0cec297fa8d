"""Follows the keys in the state database: a change is in force within a second, without a query per request.

===================================  ==========================================================================
the database                         keys in force
===================================  ==========================================================================
was never read since the start       none: clients get 503, never access without a key
was read                             those of the last read
is away                              those of the last read; a key that was revoked before stays revoked
has a key that is invalid            those of the last read
was made anew, without any key       those of the last read, until it has a key or the gateway starts again
===================================  ==========================================================================
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from config.errors import ConfigError
from gateway.keys.authentication import Keys
from gateway.keys.database import keys_of
from serving.defects import logged_defects
from serving.errors import StateAway
from serving.state.database import StateDatabase
from serving.state.keys import KeyRecords, KeyTable
from serving.state.link import Link

log = logging.getLogger(__name__)

FOLLOW_SECONDS = 0.5
AWAY_SECONDS = 1.0


class KeyFollower:
    """Calls `apply` with the keys after each change while the `async with` block runs."""

    def __init__(self, link: Link, apply: Callable[[Keys], None]) -> None:
        self.problem: str | None = None  # why the keys in force may not be those of the database
        self._link = link
        self._table = KeyTable(link.database)
        self._apply = apply
        self._seen: tuple[str, int] | None = None
        self._records: KeyRecords | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Read the keys before the first request; an unavailable database is no error."""
        await self.follow()
        self._task = asyncio.create_task(self._follow_regularly(), name="follow API keys")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._link.close()

    async def follow(self) -> None:
        """Read the keys if they have changed."""
        before = self.problem
        try:
            self.problem = await self._read_change()
        except (StateAway, ConfigError) as error:
            self.problem = str(error)
        if self.problem and self.problem != before:
            log.warning("%s; %s; retrying", self.problem, self._in_force())
        elif before and not self.problem:
            log.info("API keys are followed again in %s", self._link.database.engine.name)

    async def _follow_regularly(self) -> None:
        while True:
            await asyncio.sleep(AWAY_SECONDS if self.problem else FOLLOW_SECONDS)
            with logged_defects("following API keys"):
                await self.follow()

    async def _read_change(self) -> str | None:
        """Apply a change; return why it is not applied."""
        if await self._link.call(self._table.revision) == self._seen:
            return None
        records = await self._link.call(self._table.read)
        if is_emptied(self._records, records):
            return f"the state database {self._link.database.engine.name} was made anew and has no API key"
        self._apply(keys_of(records, self._link.database.engine.name))
        self._seen, self._records = (records.epoch, records.revision), records
        return None

    def _in_force(self) -> str:
        return "clients get 503" if self._records is None else "the API keys of the last read stay in force"


def is_emptied(before: KeyRecords | None, now: KeyRecords) -> bool:
    """Whether another database took the place of one that had keys, and has none."""
    return before is not None and bool(before.documents) and before.epoch != now.epoch and not now.documents


@asynccontextmanager
async def followed_keys(state: str, apply: Callable[[Keys], None]) -> AsyncIterator[KeyFollower]:
    """Follow the keys in a state database, which is not created, while the block runs."""
    async with KeyFollower(Link(StateDatabase.at(state, create=False)), apply) as follower:
        yield follower
