"""Polls that the workers of one parent share: each replica is polled by one of them, whose answers all apply.

==============================  ====================================================================================
a worker                        polls a replica
==============================  ====================================================================================
is its poller                   always
has a recent report of it        never: it applies the report, as if it had polled itself
has no recent report of it       by itself, until the next report: its poller is being restarted or hangs, or it gets
                                no answer, because of the replica or because it has no file descriptor left
==============================  ====================================================================================

Reports are datagrams on Unix sockets that the parent makes, so no other process can send any. One that does not fit
into a socket's buffer is dropped: the next poll says more. The monotonic clock is the same in all processes.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from zlib import crc32

import msgspec

from gateway.routing.engine_metrics import EngineMetrics

_REPORT_BYTES = 4096


class PollReport(msgspec.Struct, frozen=True, array_like=True):
    """One poll: when it was sent, and what it said; `answered` is False if nothing came back."""

    replica_id: str
    polled_at: float
    answered: bool
    poll: EngineMetrics | None = None
    missing: frozenset[str] = frozenset()


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(PollReport)


def is_poller(replica_id: str, number: int, of: int) -> bool:
    """Return whether a worker, counted from 1, polls a replica for all workers."""
    return crc32(replica_id.encode()) % of == number - 1


@dataclass(slots=True, eq=False)
class PollShare:
    """Worker `number`'s end: it receives on the first of `descriptors`, and sends on the others.

    Use as a context manager; `on_report` is called for every report that arrives.
    """

    number: int
    of: int
    descriptors: Sequence[int]
    on_report: Callable[[PollReport], None] = field(init=False)
    _own: socket.socket = field(init=False)
    _others: list[socket.socket] = field(init=False)

    def __enter__(self) -> Self:
        sockets = [socket.socket(fileno=descriptor) for descriptor in self.descriptors]
        for each in sockets:
            each.setblocking(False)
        self._own, *self._others = sockets
        self._discard()
        asyncio.get_running_loop().add_reader(self._own, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._own)
        for each in (self._own, *self._others):
            each.close()

    def is_poller(self, replica_id: str) -> bool:
        """Return whether this worker polls a replica for all."""
        return is_poller(replica_id, self.number, self.of)

    def send(self, report: PollReport) -> None:
        """Tell the other workers of a poll."""
        data = _ENCODER.encode(report)
        for each in self._others:
            # The buffer is full, or no process has the other end open any more: ECONNREFUSED, then ENOTCONN.
            with suppress(OSError):
                each.send(data)

    def _discard(self) -> None:
        """Drop what was sent to the process before this one."""
        with suppress(BlockingIOError):
            while True:
                self._own.recv(_REPORT_BYTES)

    def _receive(self) -> None:
        with suppress(BlockingIOError):
            while data := self._own.recv(_REPORT_BYTES):
                self.on_report(_DECODER.decode(data))


def poll_sockets(workers: int) -> list[tuple[socket.socket, socket.socket]]:
    """Make a pair of sockets for each worker: it receives on the first what others send on the second."""
    return [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(workers)]


def descriptors_of(place: int, pairs: Sequence[tuple[socket.socket, socket.socket]]) -> tuple[int, ...]:
    """The descriptors of a worker, counted from 0: its own, then those of the others."""
    others = [pair[1].fileno() for number, pair in enumerate(pairs) if number != place]
    return (pairs[place][0].fileno(), *others)
