"""Lists and watches the EndpointSlices of one label selector, for as long as it runs.

=========  =====================================  =====================================================
state      event                                  next
=========  =====================================  =====================================================
listing    the list is complete                   watching; the list replaces the picture in one step
listing    an error                               listing, after a pause
watching   ADDED, MODIFIED, DELETED               watching; the picture changes
watching   the server ends the watch              watching, from the last version
watching   410, as status or as ERROR event       listing; the picture stays
watching   another error                          watching, from the last version, after a pause;
                                                  after 5 without an event: listing
=========  =====================================  =====================================================

A pause is 0.5 to 30 s, or what the server asks for. Nothing that the server does not say changes the picture.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import Random

from serving.backoff import Backoff
from serving.errors import (
    ApiExpired,
    ApiForbidden,
    ApiNotFound,
    ApiRejected,
    ApiServerAway,
    ApiThrottled,
    ApiUnauthorized,
    KubernetesError,
)
from serving.kubernetes.api import Event, KubernetesApi, Resource
from serving.kubernetes.endpoints import EndpointSlice, Slices, applied, listed

log = logging.getLogger(__name__)

PAUSES = Backoff(first_seconds=0.5, longest_seconds=30.0)
# A watch that ends sooner and without a change may do so again at once.
SETTLED_SECONDS = 30.0
# The history of an API server that was restored from a backup never reaches the last version: list again then.
UNPRODUCTIVE_WATCHES = 5
EVENT_TYPES = ("added", "modified", "deleted", "bookmark")
# By class, the reason that metrics count an error under.
REASONS: tuple[tuple[type[KubernetesError], str], ...] = (
    (ApiServerAway, "away"),
    (ApiUnauthorized, "unauthorized"),
    (ApiForbidden, "forbidden"),
    (ApiNotFound, "not_found"),
    (ApiRejected, "rejected"),
    (ApiExpired, "expired"),
    (ApiThrottled, "throttled"),
)

ERROR_REASONS = tuple(reason for _, reason in REASONS)


@dataclass(frozen=True, slots=True)
class Outage:
    """Why the API server can't be read, and since when, in seconds since 1970."""

    reason: str
    since_at: float

    def __str__(self) -> str:
        return f"{self.reason} (since {datetime.fromtimestamp(self.since_at, UTC):%Y-%m-%dT%H:%M:%SZ})"


@dataclass(slots=True)
class Counts:
    """What a reflector has seen since its start: events by type, complete lists, and errors by reason."""

    events: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    lists: int = 0


# Called with all slices, and whether they come from a list rather than from an event.
OnSlices = Callable[[Slices, bool], None]


@dataclass(slots=True)
class Reflector:
    """Keeps the slices of one selector as the API server has them, while `run` runs; `on_slices` gets each picture."""

    api: KubernetesApi
    resource: Resource
    selector: str
    on_slices: OnSlices
    pauses: Backoff = PAUSES
    random: Random = field(default_factory=Random)
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    outage: Outage | None = None
    counts: Counts = field(default_factory=Counts)
    _slices: Slices = field(default_factory=dict)
    _version: str | None = None  # None: list again
    _failures: int = 0

    async def run(self) -> None:
        """List and watch for ever."""
        while True:
            self._failures += 1
            error = await self._attempt()
            await asyncio.sleep(pause_seconds(self.pauses, self._failures, error, self.random))

    async def _attempt(self) -> Exception | None:
        """List if that is needed, and watch until the server ends it; return why it failed."""
        try:
            if self._version is None or self._failures > UNPRODUCTIVE_WATCHES:
                await self._list()
            await self._watch(self._version or "")
        except ApiExpired as error:
            self._version = None
            self._count(error)
            return error
        except KubernetesError as error:
            self._count(error)
            self._lost(str(error))
            return error
        except Exception as error:  # the outermost loop: a defect at one event must not be the last
            log.exception("following the EndpointSlices with %s has a defect", self.selector)
            self._version = None
            self._lost(f"a defect: {error!r}")
            return error
        return None

    async def _list(self) -> None:
        found = await self.api.list(self.resource, EndpointSlice, self.selector)
        self.counts.lists += 1
        self._reached()
        self._slices, self._version = listed(found.items), found.version
        self.on_slices(self._slices, True)

    async def _watch(self, version: str) -> None:
        """Apply events until the server ends the watch. A watch that brought something is not a failure."""
        began = self.clock()
        try:
            async with self.api.watch(self.resource, EndpointSlice, version, self.selector) as events:
                self._reached()
                async for event in events:
                    self._apply(event)
        finally:
            if self.clock() - began >= SETTLED_SECONDS:
                self._failures = 0

    def _apply(self, event: Event[EndpointSlice]) -> None:
        self._failures, self._version = 0, event.version
        self.counts.events[event.type.lower()] += 1
        if event.object is not None:
            self._slices = applied(self._slices, event.type, event.object)
            self.on_slices(self._slices, False)

    def _count(self, error: KubernetesError) -> None:
        reason = next((name for kind, name in REASONS if isinstance(error, kind)), "away")
        self.counts.errors[reason] += 1

    def _lost(self, reason: str) -> None:
        if self.outage is None or self.outage.reason != reason:
            log.warning("%s; pods stay as they were last seen; retrying", reason)
        since_at = self.wall_clock() if self.outage is None else self.outage.since_at
        self.outage = Outage(reason, since_at)

    def _reached(self) -> None:
        if self.outage is not None:
            log.info("%s answers again", self.api.access.server)
        self.outage = None


def pause_seconds(pauses: Backoff, failures: int, error: Exception | None, random: Random) -> float:
    """Return how long to wait before the next attempt; random, so that several gateways do not ask at once.

    `error` None: the server has ended the watch. The first of those, and the first version that is too old, are usual:
    there is no pause. `failures` is the number of attempts since the last event.
    """
    if isinstance(error, ApiThrottled) and error.retry_after_seconds is not None:
        return max(error.retry_after_seconds, pauses.first_seconds)
    usual = error is None or isinstance(error, ApiExpired)
    longest = (pauses.after_crash if usual else pauses.after_start_failure)(max(failures, 1))
    return random.uniform(longest / 2, longest)
