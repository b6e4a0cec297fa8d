"""`/admin/trial` and a reader that leaves, or that does not read."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from fastapi import FastAPI

from gateway.errors import GatewayError
from gateway.handlers.trial import add_trial
from gateway.http.interfaces import ClientTimeouts
from gateway.http.listener import listen
from gateway.http.request import Request
from gateway.http.response_writer import ClientDisconnected, ResponseWriter
from gateway.http.sockets import address_of, bind
from serving.replica import State
from tests.fakes.running import eventually, running_fake
from tests.gateway.fleet import CHAT, HELLO, Fleet, deployment, running_gateway
from tests.gateway.wire import connected, posted

pytestmark = pytest.mark.asyncio(loop_scope="session")

TRIAL = posted(HELLO, "/admin/trial")
SOON_SECONDS = 5.0


async def none_in_flight(fleet: Fleet) -> None:
    """Wait until no request is in flight, less long than a queue would keep it."""

    async def look() -> bool:
        return not await fleet.total("quantgate_requests_in_flight")

    await eventually(look, SOON_SECONDS)


async def test_a_reader_that_leaves_before_the_first_byte() -> None:
    """Its request leaves the replica at once, though no response has begun."""
    async with running_fake("--fake-stall-after-tokens", "2") as stalling, running_gateway(deployment()) as fleet:
        with fleet.replicas(("hi", stalling.url)):
            async with connected(fleet.served.addresses.admin) as peer:
                await peer.say(TRIAL)
                await stalling.requested(CHAT)
            await none_in_flight(fleet)
            assert (await stalling.ended())[0]["event"] == "aborted"
            await fleet.at_rest()


async def test_a_reader_that_leaves_the_queue(fleet: Fleet) -> None:
    """Its request leaves the queue at once."""

    async def waiting() -> bool:
        return bool((await fleet.admin.get("/admin/queue")).json()["smol"] == 1)

    with fleet.replicas(("hi", "http://127.0.0.1:9"), state=State.STARTING):
        async with connected(fleet.served.addresses.admin) as peer:
            await peer.say(TRIAL)
            await eventually(waiting)
        await none_in_flight(fleet)


class EndlessHandler:
    """Writes without an end, or fails in the middle of its response; `ended` says why it has stopped."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.ended: str | None = None

    def admit(self, request: Request) -> int:
        """Admit every request."""
        return len(request.body)

    async def handle(self, request: Request, response: ResponseWriter) -> None:
        """Write until the reader is gone."""
        response.start(200, b"content-type: text/plain\r\n", b"first")
        if self.fails:
            raise GatewayError("a test")
        try:
            while True:
                response.write(b"x" * 2**16)
                await response.drain()
                await asyncio.sleep(0)
        except ClientDisconnected:
            self.ended = "slow"
            raise
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise

    def on_internal_error(self, request: Request, response: ResponseWriter) -> None:
        """The response has begun: there is nothing to say."""


@asynccontextmanager
async def served(handler: EndlessHandler, timeouts: ClientTimeouts | None = None) -> AsyncIterator[str]:
    """The endpoint on a port of its own."""
    app = FastAPI()
    add_trial(app, handler, timeouts)
    with bind("127.0.0.1:0", "test") as taken:
        async with listen(app, taken):
            yield address_of(taken)


async def test_a_reader_that_does_not_read() -> None:
    """The request ends after slow_reader_seconds."""
    handler = EndlessHandler()
    async with served(handler, ClientTimeouts(slow_reader_seconds=0.2)) as address, connected(address) as peer:
        await peer.say(TRIAL)
        assert await eventually(lambda: handler.ended, SOON_SECONDS) == "slow"


async def test_a_gateway_that_stops_cancels_it() -> None:
    """A reader that does not read holds up neither the end nor its request."""
    handler = EndlessHandler()
    async with AsyncExitStack() as peers:
        async with served(handler) as address:
            peer = await peers.enter_async_context(connected(address))
            await peer.say(TRIAL)
            await peer.read_until(b"first")
        assert handler.ended == "cancelled"


async def test_a_truncated_response_does_not_look_complete() -> None:
    """What fails after its beginning is cut, without the last chunk."""
    async with served(EndlessHandler(fails=True)) as address, connected(address) as peer:
        await peer.say(TRIAL)
        answer = await peer.read_all()
    assert b"first" in answer
    assert b"0\r\n\r\n" not in answer
