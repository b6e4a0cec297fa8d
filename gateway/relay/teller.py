"""What one client is told: an answer, whole or as a stream; an error as a status, or inside a stream that has begun."""

import asyncio
from collections.abc import Callable
from typing import Self

from gateway.api.endpoints import Endpoint
from gateway.api.sse import KEEP_ALIVE, error_event
from gateway.errors import GatewayError
from gateway.front.reply import Headers, Reply
from gateway.relay.accounting import Account

JSON = (b"content-type", b"application/json")
EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))


class Teller:
    """Tells one client; a stream that waits is kept alive with comments while the `with` block runs.

    A client that has had comments only has been told nothing yet: another replica may still be tried.
    """

    __slots__ = ("_account", "_beat", "_endpoint", "_heartbeat_seconds", "_limits", "_reply")

    def __init__(
        self, endpoint: Endpoint, account: Account, reply: Reply, limits: Callable[[], Headers] = lambda: ()
    ) -> None:
        self._endpoint = endpoint
        self._account = account
        self._reply = reply
        self._limits = limits  # what the client's key has left, as headers
        self._heartbeat_seconds = 0.0
        self._beat: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._still()

    def keep_alive(self, every_seconds: float) -> None:
        """Send a comment so often until the first event comes."""
        self._heartbeat_seconds = every_seconds
        if every_seconds:
            self._beat = asyncio.get_running_loop().call_later(every_seconds, self._heartbeat)

    def whole(self, body: bytes) -> None:
        """Answer at once."""
        self._account.begun = True
        self._reply.whole(200, (JSON, *self._own_headers()), body)

    def event(self, data: bytes) -> None:
        """Go on with a stream, which begins with its first event."""
        if self._account.begun:
            self._reply.write(data)
        elif self._reply.begun:
            # The status went out with a comment, so who answers is told in another one.
            self._account.begun = True
            self._still()
            self._reply.write(self._disclosure_comment() + data)
        else:
            self._account.begun = True
            self._still()
            self._reply.begin(200, (*EVENTS, *self._own_headers()), data)

    def end(self) -> None:
        """End a stream that has told all."""
        self._reply.end()

    async def keep_pace(self) -> None:
        """Wait until the client has read enough; ClientLeft if it doesn't in time."""
        if self._reply.congested:
            await self._reply.drained()

    def refuse(self, error: GatewayError) -> None:
        """Tell an error, in whatever way is left."""
        self._still()
        if self._reply.ended:
            return
        if self._reply.begun:
            self._reply.end(error_event(self._endpoint, error))
            return
        body = error.anthropic_body() if self._endpoint.errors == "anthropic" else error.body()
        self._reply.whole(error.status, (JSON, *error.headers(), *self._own_headers()), body)

    def _heartbeat(self) -> None:
        if not self._reply.begun:
            self._reply.begin(200, (*EVENTS, *self._own_headers()))
        self._reply.write(KEEP_ALIVE)
        self._account.metrics.heartbeats.inc()
        self._beat = asyncio.get_running_loop().call_later(self._heartbeat_seconds, self._heartbeat)

    def _still(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None

    def _own_headers(self) -> list[tuple[bytes, bytes]]:
        """The request's id, and who answers and why: nobody is sent to a quantized copy without being told."""
        request_id = self._account.request_id.encode()
        headers = [(b"x-request-id", request_id), *self._limits()]
        if self._endpoint.errors == "anthropic":
            headers.append((b"request-id", request_id))
        headers += [(b"x-quantgate-" + name, value.encode()) for name, value in self._disclosure()]
        return headers

    def _disclosure_comment(self) -> bytes:
        told = b" ".join(b"%b=%b" % (name, value.encode()) for name, value in self._disclosure())
        return b": quantgate %b\n\n" % told

    def _disclosure(self) -> list[tuple[bytes, str]]:
        choice = self._account.choice
        if choice is None:
            return []
        return [
            (b"variant", choice.variant.name),
            (b"precision", choice.variant.precision),
            (b"replica", choice.replica.id),
            (b"attempts", str(self._account.attempts)),
            (b"reason", choice.reason),
        ]
