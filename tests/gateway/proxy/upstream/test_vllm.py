"""The upstream for vLLM: the bytes of its requests, and what the exchange gets of a reply."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from config.schema import LimitSettings, ReplicaSettings
from gateway.errors import UpstreamDisconnected, UpstreamTimeout, UpstreamUnreachable
from gateway.openai.endpoints import CHAT, COMPLETIONS, MESSAGES, Endpoint
from gateway.openai.request import InferenceRequest, parse_request
from gateway.proxy.upstream import vllm
from gateway.proxy.upstream.pool import Pool
from gateway.proxy.upstream.protocol import Upstream, UpstreamReply, UpstreamRequest
from gateway.proxy.upstream.timer import DEFAULT_TIMEOUTS
from gateway.proxy.upstream.vllm import VllmUpstream
from gateway.routing.target import Timeouts
from serving.replica import Replica
from serving.tls import read_tls
from tests.fakes.running import DEADLINE_SECONDS
from tests.gateway.wire import Behaviour, Peer, answering, scripted, stream, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

REPLICA = Replica("hi-1", "hi", "bf16", "http://host:8000", "served/name")
TRACE = b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\ntracestate: a=b\r\n"


def inference(endpoint: Endpoint = CHAT, max_tokens: int | None = None, **body: Any) -> InferenceRequest:
    """A request as its endpoint parses it."""
    text = json.dumps({"model": "smol", **body}, separators=(",", ":")).encode()
    headers = {b"content-type": b"application/json"}
    return parse_request(endpoint, text, headers, LimitSettings(), frozenset(), max_tokens)


def encode(replica: Replica = REPLICA, upstream: VllmUpstream | None = None, **request: Any) -> bytes:
    """The bytes of a chat request with `top_k`, for a replica."""
    upstream = upstream or VllmUpstream(Pool())
    return upstream.encode(UpstreamRequest(inference(messages=[], top_k=3), "r-1", **request), replica)


def split(request: bytes) -> tuple[list[bytes], dict[str, Any]]:
    """The lines of a request's head, and its decoded body."""
    head, _, body = request.partition(b"\r\n\r\n")
    return head.split(b"\r\n"), json.loads(body)


# Requests


async def test_the_bytes_of_a_request() -> None:
    """A request has the served name, the credential, the request id and the trace headers, and nothing else."""
    body = b'{"model":"served/name","messages":[],"top_k":3}'
    assert encode(replace(REPLICA, api_key="secret"), trace_headers=TRACE) == (
        b"POST /v1/chat/completions HTTP/1.1\r\n"
        b"host: host:8000\r\n"
        b"content-type: application/json\r\n"
        b"authorization: Bearer secret\r\n"
        b"content-length: %d\r\n"
        b"x-request-id: r-1\r\n" % len(body) + TRACE + b"\r\n" + body
    )


async def test_a_replica_without_a_credential() -> None:
    """Without an API key there is no authorization header, and without a trace no trace headers."""
    lines, _ = split(encode())
    names = [line.partition(b":")[0] for line in lines[1:]]
    assert names == [b"host", b"content-type", b"content-length", b"x-request-id"]


@pytest.mark.parametrize(
    "url, host",
    [
        ("http://host", b"host: host"),
        ("https://host:8443", b"host: host:8443"),
        ("https://[::1]:8", b"host: [::1]:8"),
        ("unix:///run/vllm.sock", b"host: localhost"),
    ],
)
async def test_the_host(url: str, host: bytes) -> None:
    """It is the authority of the replica's url; a Unix socket has none."""
    lines, _ = split(encode(replace(REPLICA, url=url)))
    assert lines[1] == host


@pytest.mark.parametrize(
    "endpoint, body", [(COMPLETIONS, {"prompt": "é"}), (MESSAGES, {"messages": [], "max_tokens": 9})]
)
async def test_the_path_and_length(endpoint: Endpoint, body: dict[str, Any]) -> None:
    """The path is the endpoint's, and content-length counts bytes."""
    request = VllmUpstream(Pool()).encode(UpstreamRequest(inference(endpoint, **body), "r-1"), REPLICA)
    lines, sent = split(request)
    assert lines[0] == f"POST {endpoint.path} HTTP/1.1".encode()
    assert b"content-length: %d" % len(request.partition(b"\r\n\r\n")[2]) in lines
    assert sent == {**body, "model": "served/name"}


async def test_token_ids() -> None:
    """They are asked for only on request."""
    assert "return_token_ids" not in split(encode())[1]
    assert split(encode(token_ids=True))[1]["return_token_ids"] is True


@pytest.mark.parametrize("max_model_len_tokens, max_tokens", [(None, 500), (100, 100), (4000, 500)])
async def test_the_filled_in_length(max_model_len_tokens: int | None, max_tokens: int) -> None:
    """The limit of an API key is filled in, at most the context of the replica."""
    request = UpstreamRequest(inference(max_tokens=500, messages=[]), "r-1")
    replica = replace(REPLICA, max_model_len_tokens=max_model_len_tokens)
    assert split(VllmUpstream(Pool()).encode(request, replica))[1]["max_completion_tokens"] == max_tokens


async def test_heads_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded heads are reused, never for another key, url or path; when they are too many, they are made anew."""
    monkeypatch.setattr(vllm, "MAX_HEADS", 2)
    upstream = VllmUpstream(Pool())
    replicas = [
        *(replace(REPLICA, api_key=key) for key in ("a", "b", None)),
        replace(REPLICA, api_key="a", url="http://other"),
    ]
    for _ in range(2):
        for replica in replicas:
            assert encode(replica, upstream) == encode(replica)
            assert len(upstream._heads) <= 2
    completion = UpstreamRequest(inference(COMPLETIONS, prompt="a"), "r-1")
    assert upstream.encode(completion, replicas[-1]).startswith(b"POST /v1/completions HTTP/1.1\r\nhost: other\r\n")


# Replies


@asynccontextmanager
async def opened(
    behaviour: Behaviour, timeouts: Timeouts = DEFAULT_TIMEOUTS, **changes: Any
) -> AsyncIterator[UpstreamReply]:
    """Open a request to a replica with a behaviour."""
    async with scripted(behaviour) as server, Pool() as pool:
        upstream: Upstream = VllmUpstream(pool)
        replica = replace(REPLICA, url=server.url, **changes)
        with await upstream.open(UpstreamRequest(inference(messages=[]), "r-1"), replica, timeouts) as reply:
            yield reply


async def test_a_unary_reply() -> None:
    """Status and headers, with names in lower case, are there at once; the body is read up to a limit."""
    sent = whole(b"hello", "429 Busy", extra="Retry-After: 7\r\n")
    async with opened(answering(sent, close=False)) as reply:
        assert (reply.status, reply.streams, reply.headers[b"retry-after"]) == (429, False, b"7")
        assert await reply.read(5) == b"hello"
    async with opened(answering(sent, close=False)) as reply:
        with pytest.raises(UpstreamDisconnected):
            await reply.read(4)


async def test_a_stream() -> None:
    """Its pieces flow to a feed; when the feed is full, `flow` returns False, and goes on when it is called again."""
    async with opened(answering(stream(b"a", b"b", b"c"), close=False)) as reply:
        assert (reply.status, reply.streams) == (200, True)
        body = bytearray()

        def feed(data: bytes) -> bool:
            body.extend(data)
            return False

        while not await reply.flow(feed):
            pass
        assert body == b"abc"


async def test_connections_are_pooled() -> None:
    """A reply that was read to its end leaves its connection to the next request of the replica."""
    async with scripted(answering(whole(b"1"), whole(b"2"), close=False)) as server, Pool() as pool:
        upstream, replica = VllmUpstream(pool), replace(REPLICA, url=server.url)
        for body in (b"1", b"2"):
            with await upstream.open(
                UpstreamRequest(inference(messages=[]), "r-1"), replica, DEFAULT_TIMEOUTS
            ) as reply:
                assert await reply.read(9) == body
        assert len(server.peers) == 1


async def test_no_reply() -> None:
    """A replica that closes, that sends nothing in time, or that cannot be reached raises UpstreamError."""

    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.left()

    with pytest.raises(UpstreamDisconnected):
        async with opened(answering(b"")):
            pass
    with pytest.raises(UpstreamTimeout):
        async with opened(silent, Timeouts(first_byte_seconds=0.05, idle_seconds=0.05)):
            pass
    async with scripted(answering()) as gone:
        pass
    upstream = VllmUpstream(Pool())
    with (
        pytest.raises(UpstreamUnreachable),
        await upstream.open(
            UpstreamRequest(inference(messages=[]), "r-1"), replace(REPLICA, url=gone.url), DEFAULT_TIMEOUTS
        ),
    ):
        pass


async def test_leaving_early_closes_the_connection() -> None:
    """The replica sees a client that left, and stops generating."""
    left = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream(b"a")[:-5])
        await peer.left()
        left.set()

    async with scripted(behaviour) as server, Pool() as pool:
        replica = replace(REPLICA, url=server.url)
        with await VllmUpstream(pool).open(
            UpstreamRequest(inference(messages=[]), "r-1"), replica, DEFAULT_TIMEOUTS
        ) as reply:
            assert reply.status == 200
        async with asyncio.timeout(DEADLINE_SECONDS):
            await left.wait()
        assert repr(pool) == "<Pool []>"


async def test_tls(tmp_path: Path) -> None:
    """A replica's own CA is used for its connections; without it its certificate is not trusted."""
    pytest.importorskip("cryptography", reason="needs cryptography to make certificates")
    certificates = pytest.importorskip("tests.fakes.certificates")
    secure = certificates.Authority(tmp_path, "ca").issue().server_context()
    settings = ReplicaSettings.model_validate({"variant": "hi", "url": "https://h", "ca": "ca.pem"})
    tls = read_tls((settings,), tmp_path)[0]
    async with scripted(answering(whole(b"1"), close=False), secure=secure) as server, Pool() as pool:
        upstream, request = VllmUpstream(pool), UpstreamRequest(inference(messages=[]), "r-1")
        with await upstream.open(request, replace(REPLICA, url=server.url, tls=tls), DEFAULT_TIMEOUTS) as reply:
            assert await reply.read(9) == b"1"
        with pytest.raises(UpstreamUnreachable):
            await upstream.open(request, replace(REPLICA, url=server.url), DEFAULT_TIMEOUTS)
