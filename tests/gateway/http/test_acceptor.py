"""Accepting connections: the share of processes with one socket, and what ends a connection before it is open."""

import asyncio
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from gateway.http.acceptor import Acceptor
from gateway.http.sockets import bind
from tests.fakes.running import HOST, eventually

BURST = 64


class Counted(asyncio.Protocol):
    """A connection that is counted, and closed with its acceptor's count."""

    def __init__(self, opened: list[asyncio.BaseTransport]) -> None:
        self.opened = opened

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.opened.append(transport)


@contextmanager
def connected(listening: socket.socket, count: int) -> Iterator[list[socket.socket]]:
    """Connections that are in the socket's queue."""
    with ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(listening.getsockname())) for _ in range(count)]


async def test_a_burst_is_shared() -> None:
    """Two acceptors of one socket take turns: neither has the burst for itself."""
    first: list[asyncio.BaseTransport] = []
    second: list[asyncio.BaseTransport] = []
    listening = bind(f"{HOST}:0", "gateway.listen")
    with connected(listening, BURST):
        async with (
            Acceptor(listening.dup(), lambda: Counted(first)),
            Acceptor(listening, lambda: Counted(second)),
        ):
            await eventually(lambda: len(first) + len(second) == BURST)
    assert min(len(first), len(second)) >= BURST // 3
    for transport in first + second:
        transport.close()


async def test_connections_wait_while_there_are_no_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    """Without free file descriptors nothing is accepted, and nothing is lost."""
    opened: list[asyncio.BaseTransport] = []
    listening = bind(f"{HOST}:0", "gateway.listen")
    with connected(listening, 3), ExitStack() as stack:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        async with Acceptor(listening, lambda: Counted(opened)):
            # All numbers below that of the first free descriptor are taken.
            with socket.socket() as free:
                lowest = free.fileno()
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
            await eventually(lambda: "no connection can be accepted: Too many open files" in caplog.text)
            assert not opened
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            await eventually(lambda: len(opened) == 3)
    for transport in opened:
        transport.close()


async def test_a_closed_acceptor_leaves_the_queue_to_others() -> None:
    """What waits when one process stops to accept is accepted by another one that has the socket."""
    opened: list[asyncio.BaseTransport] = []
    listening = bind(f"{HOST}:0", "gateway.listen")
    other = listening.dup()
    async with Acceptor(listening, lambda: Counted([])) as acceptor:
        acceptor.close()
        acceptor.close()
        with connected(other, 3):
            async with Acceptor(other, lambda: Counted(opened)):
                await eventually(lambda: len(opened) == 3)
    for transport in opened:
        transport.close()
