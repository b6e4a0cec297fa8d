"""What the tests of the exchange share."""

import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx

from tests.fakes.running import HOST
from tests.gateway.wire import Behaviour, scripted

ROUTING_HEADERS = ("variant", "precision", "replica", "attempts", "reason")
ANSWER = b'{"id":"c","model":"m1","choices":[]}'


def event(data: str) -> bytes:
    """One event of a stream."""
    return f"data: {data}\n\n".encode()


FIRST, SECOND = event('{"model":"m1","choices":[{}]}'), event('{"model":"m1","choices":[1]}')
LAST = event('{"model":"m1","choices":[{"finish_reason":"stop"}]}')
DONE = event("[DONE]")


def routing_headers(answer: httpx.Response) -> tuple[str | None, ...]:
    """The values of the routing headers."""
    return tuple(answer.headers.get(f"x-quantgate-{name}") for name in ROUTING_HEADERS)


def unused_url() -> str:
    """A url at which nothing listens."""
    with socket.create_server((HOST, 0)) as taken:
        return f"http://{HOST}:{taken.getsockname()[1]}"


@asynccontextmanager
async def urls(*behaviours: Behaviour | None) -> AsyncIterator[list[str]]:
    """Run replicas with these behaviours; None is a url at which nothing listens."""
    async with AsyncExitStack() as stack:
        yield [
            (await stack.enter_async_context(scripted(behaviour))).url if behaviour else unused_url()
            for behaviour in behaviours
        ]
