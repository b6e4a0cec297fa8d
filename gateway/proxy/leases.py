"""What a request holds of a replica, and what it holds in the queue while it waits for one."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

from gateway.errors import GatewayError
from gateway.proxy.load.replica_load import InFlight
from gateway.routing.breaker import Breaker
from gateway.routing.pick import Candidate
from gateway.routing.request import RoutingRequest
from serving.registry import Registry
from serving.replica import Replica

# A breaker before and after a failure.
BreakerChange = tuple[Breaker, Breaker]
# `abandoned`: the client left before the replica showed whether it works.
Outcome = Literal["abandoned", "succeeded", "failed", "refused"]


class Ledger(Protocol):
    """An owner of counts that a lease is part of, from `enter` to `leave`."""

    def enter(self, lease: "Lease") -> None:
        """Count a lease in; called in the synchronous step of the decision."""

    def leave(self, lease: "Lease") -> None:
        """Count a lease out, with its outcome."""


class Lease:
    """One request on one replica: entered into every ledger by `acquire`, out of them when its `with` block ends.

    Ledgers are left in reverse order, each of them also if another raises. Say inside the block what came of the
    exchange: `succeeded`, `failed` or `refused`. `prompt_tokens` is what the engine counted, 0 until then;
    `answer_tokens` is None while unknown.
    """

    __slots__ = (
        "_held",
        "_ledgers",
        "_on_release",
        "acquired_at",
        "answer_tokens",
        "breaker_change",
        "candidate",
        "in_flight",
        "outcome",
        "probe_until",
        "prompt_tokens",
        "replica",
        "request",
        "retry_after_seconds",
        "timed_out",
    )
    replica: Replica  # set by the ledger of the registry
    in_flight: InFlight  # set by the ledger of the load
    timed_out: bool  # set by `failed`
    breaker_change: BreakerChange | None  # set by the ledger of outliers, if it failed: what that did to the breaker

    def __init__(
        self,
        candidate: Candidate,
        request: RoutingRequest,
        acquired_at: float,
        ledgers: Sequence[Ledger],
        on_release: "Callable[[Lease], None]",
    ) -> None:
        self.candidate = candidate
        self.request = request
        self.acquired_at = acquired_at
        self.outcome: Outcome = "abandoned"
        self.retry_after_seconds: float | None = None
        self.prompt_tokens = 0
        self.answer_tokens: int | None = None
        self.probe_until: float | None = None  # of a breaker's probe: when it counts as lost
        self._ledgers = ledgers
        self._on_release = on_release
        self._held = False

    def acquire(self) -> Self:
        """Enter every ledger; if one raises, those before it are left again."""
        ledgers, entered = self._ledgers, 0
        try:
            for ledger in ledgers:
                ledger.enter(self)
                entered += 1
        except BaseException:
            self._leave(reversed(ledgers[:entered]))
            raise
        self._held = True
        return self

    def release(self) -> None:
        """Leave every ledger, then let the owner give the slot away; calling it again does nothing."""
        if not self._held:
            return
        self._held = False
        try:
            self._leave(reversed(self._ledgers))
        finally:
            self._on_release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def succeeded(self) -> None:
        """The replica did what it should."""
        self.outcome = "succeeded"

    def failed(self, *, timed_out: bool = False) -> None:
        """The replica failed; overload is no failure."""
        self.outcome, self.timed_out = "failed", timed_out

    def refused(self, retry_after_seconds: float | None) -> None:
        """The replica has no room; it may have said for how long."""
        self.outcome, self.retry_after_seconds = "refused", retry_after_seconds

    def _leave(self, ledgers: Iterator[Ledger]) -> None:
        try:
            for ledger in ledgers:
                ledger.leave(self)
        except BaseException:
            # The iterator stands behind the ledger that raised.
            self._leave(ledgers)
            raise


@dataclass(frozen=True, slots=True)
class RegistryLedger:
    """Counts leases in the registry: a replica that drains waits for its count to reach zero."""

    registry: Registry

    def enter(self, lease: Lease) -> None:
        """Count the request, and look the replica up; NoSuchReplica if it has left."""
        replica, lora = self.registry.take(lease.candidate.replica.id), lease.candidate.variant.lora
        lease.replica = replica if lora is None else replica.with_adapter(lora.name)

    def leave(self, lease: Lease) -> None:
        """Count it down."""
        self.registry.give_back(lease.candidate.replica.id)


@dataclass(frozen=True, slots=True)
class QueueKey:
    """What a queue waits for: any replica of these variants with a context that is long enough, and that takes `tools`.

    Requests of one alias that the same variants may answer, and that need the same of a replica, wait in one queue.
    """

    alias: str
    variants: tuple[str, ...]
    context_tokens: float
    tools: bool = False


@dataclass(slots=True, eq=False)
class Waiter:
    """One request in a queue; its future is set to a lease, or to an error."""

    queue: QueueKey
    request: RoutingRequest
    result: "asyncio.Future[Lease]"
    deadline: float  # on the monotonic clock

    def refuse(self, error: GatewayError) -> None:
        """End the wait with an error."""
        if not self.result.done():
            self.result.set_exception(error)
