"""W3C trace context, and spans as a real collector gets them."""

import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import TracingSettings
from gateway.observability.trace_context import NOT_TRACED, Untraced, context_headers, valid_traceparent
from gateway.observability.tracing import tracing
from tests.gateway.observability.test_access_log import ENTRY
from tests.gateway.wire import HEAD_END, Peer, scripted, whole

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01".encode()


def installed() -> bool:
    """Tell whether the extra is there."""
    try:
        return all(map(find_spec, ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")))
    except ModuleNotFoundError:
        return False


needs_otel = pytest.mark.skipif(not installed(), reason="the extra `otel` is not installed")


@pytest.mark.parametrize(
    "value,valid",
    [
        (PARENT, True),
        (PARENT[:-2] + b"00", True),
        (PARENT[:-2] + b"ff", True),
        (b"cc" + PARENT[2:], True),
        (b"cc" + PARENT[2:] + b"-what-the-future-brings", True),
        (b"cc" + PARENT[2:] + b".what", False),
        (PARENT + b"-more", False),
        (b"ff" + PARENT[2:], False),
        (b"00-" + b"0" * 32 + b"-" + SPAN.encode() + b"-01", False),
        (b"00-" + TRACE.encode() + b"-" + b"0" * 16 + b"-01", False),
        (PARENT.upper(), False),
        (PARENT[:-1], False),
        (PARENT + b"\n", False),
        (b" " + PARENT, False),
        (PARENT + b", " + PARENT, False),
        (b"", False),
    ],
)
def test_what_is_a_trace_context(value: bytes, valid: bool) -> None:
    """By W3C's rules: lower-case hex of these lengths, no zero ids, version ff never, later versions may go on."""
    assert valid_traceparent(value) is valid


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_no_header_is_made_of_anything_else(parent: bytes, state: bytes) -> None:
    """What goes to a replica holds neither an end of a line nor a control character."""
    for value in (parent, PARENT):
        for _, passed in context_headers({b"traceparent": value, b"tracestate": state}):
            assert not set(passed) - {*range(0x20, 0x7F), 0x09}


@pytest.mark.parametrize(
    "headers,passed",
    [
        ({b"traceparent": PARENT}, {b"traceparent": PARENT}),
        ({b"traceparent": PARENT, b"tracestate": b"a=1, b=2"}, {b"traceparent": PARENT, b"tracestate": b"a=1, b=2"}),
        ({b"traceparent": PARENT, b"tracestate": b"a=\r\nx: y"}, {b"traceparent": PARENT}),
        ({b"traceparent": PARENT, b"tracestate": b"a=" + b"1" * 511}, {b"traceparent": PARENT}),
        ({b"traceparent": b"00-junk", b"tracestate": b"a=1"}, {}),
        ({b"tracestate": b"a=1"}, {}),
        ({b"baggage": b"secret=1"}, {}),
    ],
)
def test_tracing_that_is_off(headers: Mapping[bytes, bytes], passed: Mapping[bytes, bytes]) -> None:
    """A client's own context goes on unchanged, nothing else does."""
    trace = Untraced().begin("completions", headers)
    assert dict(trace.headers) == passed
    trace.end(ENTRY)


def test_no_context_costs_nothing() -> None:
    """Most requests have none."""
    assert Untraced().begin("completions", {b"host": b"x"}) is NOT_TRACED


async def test_off_by_default() -> None:
    """Without settings nobody is told anything."""
    async with tracing(None) as began:
        assert isinstance(began, Untraced)


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    """A gateway without tracing doesn't load OpenTelemetry."""
    code = "import sys, gateway.app; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    assert python(code).strip() == "[]"


def test_not_installed() -> None:
    """The message says what to install."""
    code = """
import asyncio, sys
sys.modules["opentelemetry"] = None
from config.errors import ConfigError
from config.schema import TracingSettings
from gateway.observability.tracing import tracing

async def main():
    async with tracing(TracingSettings(endpoint="http://127.0.0.1:4318")):
        pass

try:
    asyncio.run(main())
except ConfigError as error:
    print(error)
"""
    told = python(code)
    assert told.startswith("gateway.tracing needs OpenTelemetry (")
    assert told.strip().endswith("pip install 'quantgate[otel]'")


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout


@asynccontextmanager
async def collector() -> AsyncIterator[tuple[str, list[Any]]]:
    """A collector that takes everything: its address, and what spans came."""
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2  # noqa: PLC0415 - an extra

    spans: list[Any] = []

    async def take(peer: Peer) -> None:
        while True:
            head, _, body = (await peer.request()).partition(HEAD_END)
            assert head.startswith(b"POST /v1/traces HTTP/1.1\r\n")
            export = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
            scopes = [scope for resource in export.resource_spans for scope in resource.scope_spans]
            spans.extend(span for scope in scopes for span in scope.spans)
            await peer.say(whole(b"", kind="application/x-protobuf"))

    async with scripted(take) as server:
        yield server.url, spans


def described(span: Any) -> dict[str, Any]:
    """A span's attributes as plain values."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@needs_otel
async def test_a_span_below_the_clients() -> None:
    """The collector gets one span a request, below the client's; the replica gets its id, so that its own go below."""
    async with collector() as (url, spans):
        async with tracing(TracingSettings(endpoint=url)) as began:
            trace = began.begin("chat.completions", {b"traceparent": PARENT, b"tracestate": b"a=1"})
            trace.end(ENTRY)
        (span,) = spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("chat.completions", TRACE, SPAN)
    assert dict(trace.headers) == {
        b"traceparent": f"00-{TRACE}-{span.span_id.hex()}-01".encode(),
        b"tracestate": b"a=1",
    }
    told = described(span)
    assert (told["gen_ai.operation.name"], told["gen_ai.request.model"]) == ("chat", "smol")
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (10, 3)
    assert (told["quantgate.variant"], told["quantgate.precision"]) == ("hi", "bf16")
    assert (told["quantgate.reason"], told["quantgate.attempts"], told["quantgate.code"]) == ("preferred", 1, "200")
    assert told["gen_ai.response.time_to_first_chunk"] == 8.25
    assert span.status.code == 0


@needs_otel
async def test_a_trace_that_begins_here() -> None:
    """Without a client's context there is one all the same; a failure of ours or of a replica is an error."""
    async with collector() as (url, spans):
        async with tracing(TracingSettings(endpoint=url)) as began:
            for code, headers in (("503", {}), ("upstream_error", {b"traceparent": b"junk"}), ("404", {})):
                trace = began.begin("completions", headers)
                assert valid_traceparent(dict(trace.headers)[b"traceparent"])
                trace.end(msgspec.structs.replace(ENTRY, code=code, first_token_seconds=None))
        codes = {described(span)["quantgate.code"]: span.status.code for span in spans}
    assert codes == {"503": 2, "upstream_error": 2, "404": 0}
    assert not any(span.parent_span_id for span in spans)


@needs_otel
async def test_the_share_that_is_kept() -> None:
    """A share of what begins here; of a client's traces those that it keeps itself."""
    async with collector() as (url, spans):
        async with tracing(TracingSettings(endpoint=url, sample_share=0.0)) as began:
            began.begin("completions", {}).end(ENTRY)
            left_out = began.begin("completions", {b"traceparent": PARENT[:-2] + b"00"})
            left_out.end(ENTRY)
            began.begin("completions", {b"traceparent": PARENT}).end(ENTRY)
        (span,) = spans
    assert span.parent_span_id.hex() == SPAN
    assert dict(left_out.headers)[b"traceparent"].endswith(b"-00")


@needs_otel
async def test_a_collector_that_is_not_there() -> None:
    """Requests don't notice."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    async with tracing(TracingSettings(endpoint=url)) as began:
        began.begin("completions", {}).end(ENTRY)
