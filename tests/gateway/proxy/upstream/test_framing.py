"""Any bytes, split anywhere: a reply ends with a body or with UpstreamDisconnected, and always ends."""

import asyncio
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.errors import UpstreamDisconnected
from gateway.proxy.upstream.connection import Connection
from tests.fakes.running import DEADLINE_SECONDS
from tests.gateway.proxy.upstream.connecting import PATIENT, REQUEST, next_piece
from tests.gateway.wire import Still, chunk, stream, stream_head, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

STATUSES = st.sampled_from((0, 99, 100, 101, 103, 199, 200, 204, 304, 500, 999))
LINES = st.sampled_from(
    (
        *(b"content-length: 3\r\n", b"content-length: 0\r\n", b"content-length: -1\r\n", b"content-length: 2, 3\r\n"),
        *(b"content-length: 99999999999999999999\r\n", b"transfer-encoding: chunked\r\n", b"connection: close\r\n"),
        *(b"transfer-encoding: chunked, gzip\r\n", b"transfer-encoding: identity\r\n", b"connection: upgrade\r\n"),
        *(b"upgrade: h2c\r\n", b" folded\r\n", b"a: b\r\n", b"a b\r\n", b": c\r\n", b"d:\r\n", b"e: \0\r\n", b"f: g\n"),
    )
)
BODIES = st.one_of(
    st.sampled_from(
        (b"abc", b"\r\n", b"\n", b"0\r\n\r\n", b"0\r\nt: 1\r\n\r\n", b"ffffffffffffffffff\r\n", b"3;x=y\r\n")
    ),
    st.binary(max_size=5),
    st.builds(chunk, st.binary(max_size=5)),
    st.sampled_from((whole(b"abc"), stream(b"ab", b"c"), stream_head())),
)


def head(status: int, lines: Iterable[bytes]) -> bytes:
    """The head of a reply, valid or not."""
    return b"HTTP/1.1 %d OK\r\n%b\r\n" % (status, b"".join(lines))


REPLIES = st.builds(
    lambda parts, bodies: b"".join([*parts, *bodies]),
    st.lists(st.builds(head, STATUSES, st.lists(LINES, max_size=3)) | st.binary(max_size=20), max_size=2),
    st.lists(BODIES, max_size=4),
)


async def outcome(pieces: Iterable[bytes], *, reset: bool, flows: bool) -> tuple[int, bytes] | None:
    """The status and body of a reply that arrives in these pieces, and then ends; None: UpstreamDisconnected.

    With `flows` the body is given to a feed that is full now and then, otherwise it is read piece by piece.
    """
    connection, body = Connection(), bytearray()
    connection.connection_made(Still())
    connection.send(REQUEST, PATIENT)

    def feed(data: bytes) -> bool:
        body.extend(data)
        return len(data) % 2 == 0

    async def read() -> int:
        await connection.head()
        status = connection.status
        while flows and not await connection.flow(feed):
            pass
        while data := await next_piece(connection):
            body.extend(data)
        return status

    reading = asyncio.create_task(read())
    for piece in pieces:
        await asyncio.sleep(0)
        connection.data_received(piece)
    connection.connection_lost(ConnectionResetError() if reset else None)
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await reading, bytes(body)
    except UpstreamDisconnected:
        return None
    finally:
        assert not connection.reusable
        connection.close()


@given(REPLIES, st.sets(st.integers(1, 200)), st.booleans())
@example(stream(b"abc"), {9}, False)
@example(head(200, [b"connection: close\r\n"]) + b"abc", {50}, False)
@example(head(200, [b"transfer-encoding: chunked\r\n", b"transfer-encoding: identity\r\n"]) + b"5\r\nabc", set(), False)
async def test_any_bytes_split_anywhere(reply: bytes, cuts: set[int], reset: bool) -> None:
    """The outcome is the same wherever the reply is split, and however it is read."""
    places = [0, *sorted(cut for cut in cuts if cut < len(reply)), len(reply)]
    pieces = [reply[start:end] for start, end in pairwise(places) if start < end]
    in_one_piece = await outcome([reply] if reply else [], reset=reset, flows=False)
    assert await outcome(pieces, reset=reset, flows=False) == in_one_piece
    assert await outcome(pieces, reset=reset, flows=True) == in_one_piece
