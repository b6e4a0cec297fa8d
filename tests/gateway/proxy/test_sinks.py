"""Sinks: the same answer to a client and to a NullSink, which measures it and books nothing."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import LimitSettings
from gateway.errors import GatewayError, UpstreamDisconnected, UpstreamError
from gateway.keys import ANONYMOUS
from gateway.observability.metrics import Metrics
from gateway.openai.endpoints import CHAT, MESSAGES, RESPONSES, Endpoint
from gateway.openai.request import InferenceRequest, parse_request
from gateway.proxy.client_response import ClientResponse
from gateway.proxy.exchange import reasoning_format, send_answer, stream_answer
from gateway.proxy.stats import RequestStats
from gateway.proxy.upstream.protocol import NullSink, Sink
from tests.gateway.proxy import recorded
from tests.gateway.proxy.contexts import (
    REPLICA,
    SMOL,
    RecordingTransport,
    client_response,
    request_context,
    request_stats,
)

STREAMS = [
    *((CHAT, name) for name in recorded.CHATS),
    *((MESSAGES, name) for name in recorded.MESSAGES),
    *((RESPONSES, name) for name in recorded.RESPONSES),
]
BODIES: dict[str, dict[str, Any]] = {
    CHAT.name: {"messages": []},
    MESSAGES.name: {"messages": [], "max_tokens": 9},
    RESPONSES.name: {"input": ""},
}
BROKEN = b'data: {"error":{"message":"secret","type":"x","param":null,"code":500}}\n\n'


def values(stats: RequestStats) -> dict[str, object]:
    """Everything that the statistics of a request hold."""
    return {name: getattr(stats, name) for name in RequestStats.__slots__ if hasattr(stats, name)}


@dataclass
class Reply:
    """Implements UpstreamReply for a body in pieces."""

    pieces: list[bytes]
    status: int = 200
    headers: Mapping[bytes, bytes] = field(default_factory=dict)
    streams: bool = True

    async def read(self, limit_bytes: int) -> bytes:
        """Return the whole body."""
        return b"".join(self.pieces)[:limit_bytes]

    async def flow(self, feed: Callable[[bytes], bool]) -> bool:
        """Give the pieces to `feed` until it is full, or none is left."""
        while self.pieces:
            if not feed(self.pieces.pop(0)):
                return False
        return True


@dataclass
class Client:
    """The client of one request: its statistics, and the response whose bytes it has got."""

    inference: InferenceRequest
    transport: RecordingTransport = field(default_factory=RecordingTransport)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.stats = request_stats(self.metrics)
        self.response: ClientResponse = client_response(self.inference, self.stats, self.transport)

    def body(self) -> bytes:
        """The body of the response, without its chunks if it is chunked."""
        head, _, rest = bytes(self.transport.written).partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" not in head:
            return rest
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            body, rest = body + rest[:length], rest[length + 2 :]
        return body

    def samples(self) -> dict[str, float]:
        """Every sample of its metrics; those of the process change by themselves."""
        return {
            f"{sample.name}{sample.labels}": sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created") and not sample.name.startswith("process_")
        }


def inference(endpoint: Endpoint = CHAT, *, stream: bool = True) -> InferenceRequest:
    """A request of an endpoint."""
    text = json.dumps({"model": "smol", "stream": stream, **BODIES[endpoint.name]}).encode()
    return parse_request(endpoint, text, {b"content-type": b"application/json"}, LimitSettings())


def events(name: str) -> list[bytes]:
    """The events of a recorded stream."""
    return recorded.events(recorded.recorded(name))


async def stream(request: InferenceRequest, pieces: list[bytes], stats: RequestStats, sink: Sink) -> None:
    """Pass a stream on to a sink."""
    await stream_answer(request, reasoning_format(request, SMOL, REPLICA), Reply([*pieces]), stats, sink)


# A NullSink measures what a client gets


@pytest.mark.parametrize("endpoint, name", STREAMS, ids=[name for _, name in STREAMS])
async def test_a_stream(endpoint: Endpoint, name: str) -> None:
    """Client and NullSink get the same number of events and bytes, and both streams are complete."""
    request = inference(endpoint)
    client, sink, copy = Client(request), NullSink(), request_stats()
    await stream(request, events(name), client.stats, client.response)
    await stream(request, events(name), copy, sink)
    body = client.body()
    assert sink.events > 1
    assert (sink.events, sink.bytes, sink.complete) == (body.count(b"\n\n"), len(body), True)
    measured = [(stats.usage, stats.finish, stats.token_events, stats.code) for stats in (client.stats, copy)]
    assert measured[0] == measured[1]
    assert copy.code == "200"


@given(st.sets(st.integers(1, 3000)))
async def test_a_stream_split_anywhere(cuts: set[int]) -> None:
    """How a stream arrives makes no difference to what is measured."""
    data, request = b"".join(events("text")), inference()
    places = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    whole, split = NullSink(), NullSink()
    await stream(request, [data], request_stats(), whole)
    await stream(request, [data[start:end] for start, end in pairwise(places)], request_stats(), split)
    assert (split.events, split.bytes, split.complete) == (whole.events, whole.bytes, True)


async def test_a_unary_answer() -> None:
    """Client and NullSink get the same bytes, and no events."""
    request = inference(stream=False)
    client, sink, copy = Client(request), NullSink(), request_stats()
    reasoning = reasoning_format(request, SMOL, REPLICA)
    await send_answer(request, reasoning, Reply([recorded.WHOLE], streams=False), client.stats, client.response)
    await send_answer(request, reasoning, Reply([recorded.WHOLE], streams=False), copy, sink)
    assert (sink.events, sink.bytes, sink.complete) == (0, len(client.body()), True)
    assert json.loads(client.body())["model"] == "smol"
    assert (copy.usage, copy.finish, copy.code) == (client.stats.usage, client.stats.finish, "200")


@pytest.mark.parametrize(
    "pieces, error",
    [
        ([], UpstreamDisconnected),
        (events("text")[:3], UpstreamDisconnected),
        ([*events("text")[:3], BROKEN], UpstreamError),
    ],
    ids=["empty", "cut off", "with an error"],
)
async def test_a_stream_that_fails(pieces: list[bytes], error: type[GatewayError]) -> None:
    """Both sinks have what came before the error, and neither is complete."""
    request = inference()
    client, sink, copy = Client(request), NullSink(), request_stats()
    for stats, target in ((client.stats, client.response), (copy, sink)):
        with pytest.raises(error):
            await stream(request, pieces, stats, target)
    body = client.body()
    assert (sink.events, sink.bytes, sink.complete) == (body.count(b"\n\n"), len(body), False)
    assert BROKEN not in body
    assert client.stats.complete is copy.complete is False
    assert client.stats.code == copy.code == "500"


# A NullSink books nothing to the caller


async def test_a_copy_books_nothing_to_the_caller() -> None:
    """After the client's own answer a copy changes neither its response, nor its statistics, nor its metrics."""
    request = inference()
    client = Client(request)
    await stream(request, events("text"), client.stats, client.response)
    written, samples, booked = bytes(client.transport.written), client.samples(), values(client.stats)
    copy = request_stats(Metrics(), "r-2")
    await stream(request, events("text"), copy, NullSink())
    assert (bytes(client.transport.written), client.samples(), values(client.stats)) == (written, samples, booked)
    assert copy.token_events == client.stats.token_events > 0
    assert (client.stats.started, copy.started) == (True, False), "no client has received a part of a copy"


async def test_a_copy_of_a_request_that_is_answered_later() -> None:
    """The context of the client's request is as before: no attempt, nothing sent, nothing metered."""
    request = inference()
    context = request_context(request, ANONYMOUS, {})
    before = values(context.stats)
    sink = NullSink()
    await stream(request, events("text"), request_stats(Metrics(), "r-2"), sink)
    assert values(context.stats) == before
    assert (context.stats.tokens, context.stats.started, context.failure, len(context.tried)) == (0, False, None, 0)
    assert sink.complete


# Backpressure


async def test_a_slow_client() -> None:
    """While the client does not read, the stream waits in `drain` after each piece; all of it arrives."""
    request = inference()
    client, fast = Client(request), Client(request)
    client.transport.write_paused = True
    await stream(request, events("text"), client.stats, client.response)
    assert len(client.transport.drained) == len(events("text"))
    assert client.transport.drained == sorted(client.transport.drained)
    await stream(request, events("text"), fast.stats, fast.response)
    assert fast.transport.drained == []
    assert client.body() == fast.body()


async def test_a_null_sink_is_never_full() -> None:
    """It discards as fast as a replica sends."""
    sink: Sink = NullSink()
    sink.write(b"data: 1\n\n" * 1000)
    assert not sink.write_paused
    await sink.drain()
