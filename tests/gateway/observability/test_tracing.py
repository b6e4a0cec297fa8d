"""Propagation of W3C trace context, and spans as an OTLP collector receives them."""

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
from gateway.observability.trace_context import NOT_TRACED, NoTracing, context_headers, valid_traceparent
from gateway.observability.tracing import tracing
from tests.gateway.observability.records import RECORD
from tests.gateway.wire import HEAD_END, Peer, scripted, whole

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
# Attributes of inference spans in open-telemetry/semantic-conventions-genai, and of HTTP servers, that are used here.
CONVENTIONS = {
    *("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model", "gen_ai.request.stream"),
    *("gen_ai.response.model", "gen_ai.response.finish_reasons", "gen_ai.response.time_to_first_chunk"),
    *("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens", "gen_ai.usage.reasoning.output_tokens"),
    *("http.response.status_code", "error.type"),
}
PARENT = f"00-{TRACE}-{SPAN}-01".encode()


def installed() -> bool:
    """Return whether the extra `otel` is installed."""
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
def test_valid_traceparent(value: bytes, valid: bool) -> None:
    """The rules of W3C: lower-case hex, fixed lengths, no zero ids, no version ff, later versions may append."""
    assert valid_traceparent(value) is valid


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_headers_are_safe(parent: bytes, state: bytes) -> None:
    """Propagated headers contain neither line ends nor control characters."""
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
def test_propagation(headers: Mapping[bytes, bytes], passed: Mapping[bytes, bytes]) -> None:
    """A valid client context is propagated unchanged, other headers are not."""
    trace = NoTracing().begin("completions", headers)
    assert dict(trace.headers) == passed
    trace.end(RECORD)


def test_no_context_costs_nothing() -> None:
    """A request without trace context shares one object."""
    assert NoTracing().begin("completions", {b"host": b"x"}) is NOT_TRACED


async def test_off_by_default() -> None:
    """Without settings no spans are created."""
    async with tracing(None) as tracer:
        assert isinstance(tracer, NoTracing)


def test_opentelemetry_is_imported_lazily() -> None:
    """A gateway without tracing does not import OpenTelemetry."""
    code = "import sys, gateway.app; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    assert python(code).strip() == "[]"


def test_not_installed() -> None:
    """The error names the extra to install."""
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
    message = python(code)
    assert message.startswith("gateway.tracing needs OpenTelemetry (")
    assert message.strip().endswith("pip install 'quantgate[otel]'")


def python(code: str) -> str:
    """Run code in a new interpreter and return its output."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout


@asynccontextmanager
async def collector() -> AsyncIterator[tuple[str, list[Any]]]:
    """Run an OTLP collector; yields its URL and the list of received spans."""
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2  # noqa: PLC0415 - an extra

    spans: list[Any] = []

    async def receive(peer: Peer) -> None:
        while True:
            head, _, body = (await peer.request()).partition(HEAD_END)
            assert head.startswith(b"POST /v1/traces HTTP/1.1\r\n")
            export = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
            scopes = [scope for resource in export.resource_spans for scope in resource.scope_spans]
            spans.extend(span for scope in scopes for span in scope.spans)
            await peer.say(whole(b"", kind="application/x-protobuf"))

    async with scripted(receive) as server:
        yield server.url, spans


def attributes_of(span: Any) -> dict[str, Any]:
    """Return a span's attributes as plain values."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@needs_otel
async def test_child_span_of_the_client() -> None:
    """A request has one span, a child of the client's; the replica's headers name it as the parent."""
    async with collector() as (url, spans):
        async with tracing(TracingSettings(endpoint=url)) as tracer:
            trace = tracer.begin("chat.completions", {b"traceparent": PARENT, b"tracestate": b"a=1"})
            trace.end(RECORD)
        (span,) = spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("chat smol", TRACE, SPAN)
    assert dict(trace.headers) == {
        b"traceparent": f"00-{TRACE}-{span.span_id.hex()}-01".encode(),
        b"tracestate": b"a=1",
    }
    attributes = attributes_of(span)
    assert (attributes["gen_ai.operation.name"], attributes["gen_ai.request.model"]) == ("chat", "smol")
    assert (attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"]) == (10, 3)
    assert (attributes["quantgate.variant"], attributes["quantgate.precision"]) == ("hi", "bf16")
    assert (attributes["quantgate.reason"], attributes["quantgate.attempts"], attributes["quantgate.code"]) == (
        "preferred",
        1,
        "200",
    )
    assert attributes["gen_ai.response.time_to_first_chunk"] == 8.25
    assert attributes["gen_ai.usage.reasoning.output_tokens"] == 1
    assert attributes["http.response.status_code"] == 200
    assert set(attributes) <= CONVENTIONS | {name for name in attributes if name.startswith("quantgate.")}
    assert span.status.code == 0


@needs_otel
@pytest.mark.parametrize(
    "endpoint,alias,name",
    [
        ("chat.completions", "smol", "chat smol"),
        ("responses", "smol", "chat smol"),
        ("messages", "smol", "chat smol"),
        ("completions", "smol", "text_completion smol"),
        ("embeddings", "smol", "embeddings smol"),
        ("tokenize", "smol", "tokenize smol"),
        ("chat.completions", "_unknown", "chat"),
    ],
)
def test_span_names(endpoint: str, alias: str, name: str) -> None:
    """The operation of the conventions, and the model if it is known."""
    from gateway.observability.spans import attributes, span_name  # noqa: PLC0415 - an extra

    record = msgspec.structs.replace(RECORD, endpoint=endpoint, alias=alias)
    assert span_name(record) == name
    assert attributes(record)["gen_ai.operation.name"] == name.partition(" ")[0]


@needs_otel
def test_what_is_unknown_is_left_out() -> None:
    """A request that no replica was chosen for has no model of the answer, usage or finish reason."""
    from gateway.observability.spans import attributes  # noqa: PLC0415 - an extra

    none = dict.fromkeys(("variant", "precision", "replica", "reason", "finish"), "none")
    record = msgspec.structs.replace(RECORD, alias="_unknown", code="404", **none)
    assert set(attributes(record)) == {
        *("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.stream", "http.response.status_code"),
        *("quantgate.request_id", "quantgate.attempts", "quantgate.code", "quantgate.queued_seconds"),
    }


@needs_otel
async def test_root_span() -> None:
    """Without a client context the gateway starts a trace; failures of the gateway or a replica are errors."""
    async with collector() as (url, spans):
        async with tracing(TracingSettings(endpoint=url)) as tracer:
            for code, headers in (("503", {}), ("upstream_error", {b"traceparent": b"junk"}), ("404", {})):
                trace = tracer.begin("completions", headers)
                assert valid_traceparent(dict(trace.headers)[b"traceparent"])
                trace.end(msgspec.structs.replace(RECORD, code=code, first_token_seconds=None))
        codes = {attributes_of(span)["quantgate.code"]: span.status.code for span in spans}
        types = {attributes_of(span).get("error.type") for span in spans}
    assert codes == {"503": 2, "upstream_error": 2, "404": 0}
    assert types == {"503", "upstream_error", None}
    assert not any(span.parent_span_id for span in spans)


@needs_otel
async def test_sampling() -> None:
    """sample_share applies to traces that start here; a client's sampled flag decides for its own."""
    async with collector() as (url, spans):
        async with tracing(TracingSettings(endpoint=url, sample_share=0.0)) as tracer:
            tracer.begin("completions", {}).end(RECORD)
            unsampled = tracer.begin("completions", {b"traceparent": PARENT[:-2] + b"00"})
            unsampled.end(RECORD)
            tracer.begin("completions", {b"traceparent": PARENT}).end(RECORD)
        (span,) = spans
    assert span.parent_span_id.hex() == SPAN
    assert dict(unsampled.headers)[b"traceparent"].endswith(b"-00")


@needs_otel
async def test_a_collector_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    """The request gets its span all the same; the exporter logs that it dropped the batch, and nothing is raised."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    async with tracing(TracingSettings(endpoint=url)) as began:
        trace = began.begin("completions", {})
        assert valid_traceparent(dict(trace.headers)[b"traceparent"])
        trace.end(RECORD)
    assert "Failed to export" in caplog.text
