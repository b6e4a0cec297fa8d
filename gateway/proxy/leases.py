"""What a request holds of a replica, and what it holds while it waits for one."""

import asyncio
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import msgspec

from config.schema import Floor
from config.variant import Variant
from gateway.errors import GatewayError
from gateway.proxy.load.replica_load import InFlight
from gateway.routing.catalog import Target
from gateway.routing.pick import Choice
from gateway.routing.request import NOTHING_KNOWN, Ask


class Want(msgspec.Struct, frozen=True, gc=False, eq=False):
    """One request that wants a replica of these rungs.

    `turn` is its turn among equals; `body_bytes` is what it takes while it waits, `prompt_bytes` how long its prompt is
    as text, which tells how many bytes make a token once its engine has counted them. `floors` and `precisions` are
    what left no more rungs than these.
    """

    target: Target
    rungs: tuple[Variant, ...]
    turn: int
    ask: Ask = NOTHING_KNOWN
    key: str = ""
    request_id: str = ""
    streams: bool = False
    body_bytes: int = 0
    prompt_bytes: int = 0
    floors: tuple[Floor, ...] = ()
    precisions: frozenset[str] | None = None


class Lessor(Protocol):
    """Whoever gives leases out, and takes them back."""

    def began(self, lease: "Lease") -> None:
        """The first token is there."""

    def release(self, lease: "Lease") -> None:
        """End a lease."""

    def succeeded(self, lease: "Lease") -> None:
        """The replica did what it should."""

    def failed(self, lease: "Lease") -> None:
        """The replica failed."""

    def refused(self, lease: "Lease", retry_after_seconds: float | None) -> None:
        """The replica has no room."""


@dataclass(slots=True)
class Lease:
    """One request on one replica, counted from the choice to the end of the `with` block.

    Say `succeeded`, `failed` or `refused` inside it; an exchange that ends without any was given up by its client.
    `prompt_tokens` is what the engine counted, 0 as long as it has not; `answer_tokens` is None while nobody knows.
    """

    choice: Choice
    want: Want
    asked_at: float
    sent: InFlight
    _lessor: Lessor
    prompt_tokens: int = 0
    answer_tokens: int | None = None
    probe_until: float | None = None  # it finds out whether a replica works again, and is believed lost by then

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lessor.release(self)

    def began(self) -> None:
        """The first token is there."""
        self._lessor.began(self)

    def succeeded(self) -> None:
        """The replica did what it should."""
        self._lessor.succeeded(self)

    def failed(self) -> None:
        """The replica failed; overload is no failure."""
        self._lessor.failed(self)

    def refused(self, retry_after_seconds: float | None) -> None:
        """The replica has no room."""
        self._lessor.refused(self, retry_after_seconds)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a line waits for: any replica of these rungs, with a context of so many tokens at least.

    Two demands of one alias, the same rungs and the same context are one line.
    """

    alias: str
    names: tuple[str, ...]
    context_tokens: float
    target: Target = field(compare=False)
    rungs: tuple[Variant, ...] = field(compare=False)


@dataclass(slots=True, eq=False)
class Ticket:
    """One request that waits; it gets a lease, or an error."""

    demand: Demand
    want: Want
    served: "asyncio.Future[Lease]"

    def refuse(self, error: GatewayError) -> None:
        """Tell it that it waits for nothing."""
        if not self.served.done():
            self.served.set_exception(error)


def demand_for(want: Want, context_tokens: float) -> Demand:
    """Name the line that a request would wait in."""
    names = tuple([rung.name for rung in want.rungs])
    return Demand(want.target.name, names, context_tokens, want.target, want.rungs)
