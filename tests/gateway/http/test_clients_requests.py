"""Requests as clients and proxies of the world send them: offers of HTTP/2, absolute URLs, gzip, trailers."""

import gzip
import zlib

import pytest

from gateway.http.content_encoding import MAX_MEMBERS
from tests.fakes.running import eventually
from tests.gateway.http.echo_server import HEAD, LIMIT_BYTES, said, served
from tests.gateway.wire import connected

pytestmark = pytest.mark.asyncio(loop_scope="session")

# What java.net.http.HttpClient of JDK 17 sends by default; the port is not its own.
JAVA_HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: 30\r\n"
    b"Host: 127.0.0.1:27999\r\nHTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\r\nUpgrade: h2c\r\n"
    b"User-Agent: Java-http-client/17.0.15\r\nAuthorization: Bearer qg-java\r\nContent-Type: application/json\r\n\r\n"
)
JAVA_POST = JAVA_HEAD + b'{"model":"smol","messages":[]}'
JAVA_GET = (
    b"GET /v1/models HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: 0\r\nHost: 127.0.0.1:27999\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\r\nUpgrade: h2c\r\n"
    b"User-Agent: Java-http-client/17.0.15\r\n\r\n"
)
# `curl --http2`, 7.88.
CURL_POST = (
    b"POST /curl HTTP/1.1\r\nHost: 127.0.0.1:27999\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n"
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
    b'content-type: application/json\r\nContent-Length: 13\r\n\r\n{"model":"m"}'
)
UPGRADE = b"connection: upgrade\r\nupgrade: h2c\r\n"
CHUNKS = b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
WEBSOCKET_GET = b"GET /ws HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"


@pytest.mark.parametrize("piece", [1, 13, 10_000])
async def test_an_offered_upgrade_is_ignored(piece: int) -> None:
    """Bodies are read, and one request follows the other, as if h2c or a websocket had not been offered."""
    chunked = HEAD + UPGRADE + b"transfer-encoding: chunked\r\n\r\n" + CHUNKS
    requests = (
        (JAVA_POST, b"POST /v1/chat/completions 30"),
        (CURL_POST, b"POST /curl 13"),
        (JAVA_GET, b"GET /v1/models 0"),
        (chunked, b"POST /x 5"),
        (WEBSOCKET_GET, b"GET /ws 0"),
        (HEAD + b"content-length: 2\r\n\r\nab", b"POST /x 2"),
    )
    data = b"".join(request for request, _ in requests)
    async with served() as here, connected(here.url) as peer:
        for place in range(0, len(data), piece):
            await peer.say(data[place : place + piece])
        for _, told in requests:
            assert (await peer.read_until(told)).startswith(b"HTTP/1.1 200 OK\r\ndate: ")


async def test_refusals_of_requests_that_offer_an_upgrade() -> None:
    """A long or forbidden body is refused as without the offer, and what was announced is not read as a request."""
    secret = HEAD.replace(b"/x", b"/secret") + UPGRADE
    async with served() as here:
        async with connected(here.url) as peer:
            await peer.say(secret + b"content-length: 5\r\n\r\nhello" + HEAD + b"content-length: 0\r\n\r\n")
            assert (await peer.read_until(b"no API key")).startswith(b"HTTP/1.1 401 ")
            await peer.read_until(b"POST /x 0")
        async with connected(here.url) as peer:
            assert (await said(peer, secret + b"content-length: 400000\r\n\r\n" + b"x" * 400_000)).startswith(
                b"HTTP/1.1 401 "
            )
        async with connected(here.url) as peer:
            await peer.say(HEAD + UPGRADE + b"connection: close\r\ncontent-length: 2\r\n\r\nab")
            assert b"connection: close" in await peer.read_all()


@pytest.mark.parametrize(
    "target, path",
    [
        (b"http://gateway:8000/x?a=b", b"/x?a=b"),
        (b"HTTP://gateway:8000/x", b"/x"),
        (b"https://gateway:8000/x", b"/x"),
        (b"http://gateway:8000", b"/"),
        (b"http://gateway:8000?a=http://x/", b"/?a=http://x/"),
    ],
)
async def test_absolute_form(target: bytes, path: bytes) -> None:
    """A client that takes the gateway for its proxy sends a whole URL; its authority replaces the header Host."""
    async with served() as here, connected(here.url) as peer:
        await peer.say(b"GET %b HTTP/1.1\r\nhost: other\r\n\r\n" % target)
        await peer.read_until(b"GET %b 0" % path)
        await peer.say(b"GET http://gateway:8000/head HTTP/1.1\r\nhost: other\r\n\r\n")
        await peer.read_until(b"host=gateway:8000\n")


async def test_a_target_for_the_whole_server() -> None:
    """`OPTIONS *` is a request like any other."""
    async with served() as here, connected(here.url) as peer:
        await peer.say(b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n")
        await peer.read_until(b"OPTIONS * 0")


async def test_trailers_are_no_headers() -> None:
    """What follows a body neither adds a header nor changes one, and does not make the next request's."""
    body = b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
    head = HEAD.replace(b"/x", b"/head") + b"x-quantgate-floor: kl_mean=0.01\r\n"
    trailers = b"x-quantgate-floor: kl_mean=9\r\nx-added: 1\r\nhost: b\r\nauthorization: Bearer c\r\n\r\n"
    async with served() as here, connected(here.url) as peer:
        await peer.say(head + body + trailers)
        answer = await peer.read_until(b"body=a")
        assert answer.endswith(
            b"host=a\ntransfer-encoding=chunked\nx-quantgate-floor=kl_mean=0.01\nbody=a",
        )
        await peer.say(HEAD.replace(b"/x", b"/head") + b"content-length: 1\r\n\r\nb")
        assert (await peer.read_until(b"body=b")).endswith(b"\r\n\r\ncontent-length=1\nhost=a\nbody=b")


async def test_repeated_restrictions_are_kept_apart() -> None:
    """A repeated floor or precision can be told from a list, which a repeated header of any other name becomes."""
    fields = b"x-quantgate-precision: bf16\r\nx-a: 1\r\nx-quantgate-precision: int8\r\nx-a: 2\r\n\r\n"
    async with served() as here, connected(here.url) as peer:
        await peer.say(b"GET /head HTTP/1.1\r\nhost: a\r\n" + fields)
        await peer.read_until(b"host=a\nx-a=1, 2\nx-quantgate-precision=bf16\nint8\nbody=")


def encoded(data: bytes, encoding: bytes = b"gzip", path: bytes = b"/head") -> bytes:
    """A request with a body of this encoding."""
    head = HEAD.replace(b"/x", path) + b"content-encoding: %b\r\n" % encoding
    return head + b"content-length: %d\r\n\r\n" % len(data) + data


@pytest.mark.parametrize("piece", [1, 10_000])
@pytest.mark.parametrize("encoding", [b"gzip", b"x-gzip", b"GZIP"])
async def test_a_gzip_body(piece: int, encoding: bytes) -> None:
    """It is decompressed as it arrives, member by member, and the handler sees no encoding any more."""
    data = encoded(gzip.compress(b'{"model":') + gzip.compress(b'"smol"}'), encoding)
    async with served() as here, connected(here.url) as peer:
        for _ in range(2):
            for place in range(0, len(data), piece):
                await peer.say(data[place : place + piece])
            answer = await peer.read_until(b'body={"model":"smol"}')
            assert b"content-encoding" not in answer
        await eventually(lambda: here.front.reserved_bytes == 0 or None)


@pytest.mark.parametrize("size", [LIMIT_BYTES, LIMIT_BYTES + 1, 100 * 2**20])
async def test_a_gzip_body_has_the_limit_of_what_it_unpacks_to(size: int) -> None:
    """A few bytes that unpack to more than a body may have are refused without unpacking the rest."""
    async with served() as here, connected(here.url) as peer:
        await peer.say(encoded(gzip.compress(b"x" * size), path=b"/x"))
        answer = await peer.read_until(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 " if size == LIMIT_BYTES else b"HTTP/1.1 413 ")


PACKED = gzip.compress(b"hello", mtime=0)  # in the ids of tests, so the same in every process


@pytest.mark.parametrize(
    "data, encoding, status, words",
    [
        (b"hello", b"identity", 200, b"body=hello"),
        (b"hello", b"", 200, b"body=hello"),
        (b"hello", b"br", 415, b"'br' is not supported; send gzip"),
        (PACKED, b"gzip, gzip", 415, b"is not supported"),
        (zlib.compress(b"hello"), b"deflate", 415, b"is not supported"),
        (b"hello", b"gzip", 400, b"the body is not valid gzip"),
        (b"", b"gzip", 400, b"the gzip body is incomplete"),
        (PACKED[:-1], b"gzip", 400, b"the gzip body is incomplete"),
        (PACKED[:-8] + b"12345678", b"gzip", 400, b"the body is not valid gzip"),
        (PACKED + b"x", b"gzip", 400, b"the gzip body is incomplete"),
        (PACKED + b"xyz", b"gzip", 400, b"the body is not valid gzip"),
        (PACKED * 2, b"gzip", 200, b"body=hellohello"),
        (PACKED * 2 + PACKED[:-1], b"gzip", 400, b"the gzip body is incomplete"),
        (PACKED + gzip.compress(b"x" * (LIMIT_BYTES - 4), mtime=0), b"gzip", 413, b"bytes"),
        (gzip.compress(b"", mtime=0) * (MAX_MEMBERS + 1), b"gzip", 400, b"more than 4096 members"),
    ],
)
async def test_other_encodings(data: bytes, encoding: bytes, status: int, words: bytes) -> None:
    """Any other encoding is refused with 415, broken gzip with 400; the connection can be used again."""
    async with served() as here, connected(here.url) as peer:
        await peer.say(encoded(data, encoding))
        answer = await peer.read_until(words)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        if status != 200:
            await peer.read_until(b"}}")
        await peer.say(HEAD + b"content-length: 0\r\n\r\n")
        await peer.read_until(b"POST /x 0")
