"""What the exchange needs of a replica's side and of the client's side; it knows no pools, hosts or credentials."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec

from gateway.openai.request import InferenceRequest
from gateway.routing.target import Timeouts
from serving.replica import Replica


def ignore_cost(_: float) -> None:
    """Do nothing: replicas cost nothing by the answer."""


class UpstreamRequest(msgspec.Struct, frozen=True, gc=False):
    """One request for a replica; `trace_headers` are lines that continue the client's trace.

    `token_ids`: ask the engine for token ids, which the client does not see. `book_cost` gets what an external model
    costs, in US dollars.
    """

    inference: InferenceRequest
    request_id: str
    trace_headers: bytes = b""
    token_ids: bool = False
    book_cost: Callable[[float], None] = ignore_cost


class UpstreamReply(Protocol):
    """A reply whose head has arrived; header names are lower case."""

    @property
    def status(self) -> int:
        """The status code."""

    @property
    def headers(self) -> Mapping[bytes, bytes]:
        """The headers."""

    @property
    def streams(self) -> bool:
        """Whether the body is a stream of server-sent events."""

    async def read(self, limit_bytes: int) -> bytes:
        """Read the whole body; UpstreamDisconnected if it is longer."""

    async def flow(self, feed: Callable[[bytes], bool]) -> bool:
        """Give each piece of the body to `feed` as it arrives; True at the end, False when `feed` returned False."""


class Upstream(Protocol):
    """A kind of replica that can be asked."""

    def open(
        self, request: UpstreamRequest, replica: Replica, timeouts: Timeouts
    ) -> Awaitable[AbstractContextManager[UpstreamReply]]:
        """Send a request, and wait for the head of the reply; UpstreamError if there is none.

        The end of the reply's `with` block ends the request at the replica, if it has not ended.
        """


class Sink(Protocol):
    """Where an answer goes: to a client, or nowhere."""

    @property
    def write_paused(self) -> bool:
        """Whether the reader is slower than the writer: then await `drain`."""

    def send(self, body: bytes) -> None:
        """Send a whole answer."""

    def begin(self) -> str | None:
        """Forget the openers of an earlier attempt; returns the id of a response that the reader knows already."""

    def hold(self, openers: bytes) -> None:
        """Keep events that carry no content until `write` sends the first that does."""

    def write(self, events: bytes) -> None:
        """Send events of a stream, behind those that are held; the first ones start it."""

    def end(self) -> None:
        """End a stream that is complete."""

    async def drain(self) -> None:
        """Wait until the reader has read enough."""


class NullSink:
    """Discards an answer and measures it: for copies of requests whose answers no client sees."""

    __slots__ = ("_held", "bytes", "complete", "events")
    write_paused = False

    def __init__(self) -> None:
        self._held = b""
        self.bytes = 0
        self.events = 0
        self.complete = False

    def send(self, body: bytes) -> None:
        """Count a whole answer."""
        self.bytes, self.complete = len(body), True

    def begin(self) -> None:
        """Forget what is held."""
        self._held = b""

    def hold(self, openers: bytes) -> None:
        """Keep events that count only if others follow."""
        self._held += openers

    def write(self, events: bytes) -> None:
        """Count events."""
        events, self._held = self._held + events, b""
        self.bytes += len(events)
        self.events += events.count(b"\n\n")

    def end(self) -> None:
        """Record that the stream is complete."""
        self.complete = True

    async def drain(self) -> None:
        """Return at once."""
