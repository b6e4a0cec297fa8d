"""OpenTelemetry spans, one per request.

A thread of the SDK exports them in batches, so a slow or absent collector does not delay requests. Imported only if
`gateway.tracing` is configured.
"""

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from config.schema import TracingSettings
from gateway.observability.access_log import AccessRecord
from gateway.observability.metrics import UNKNOWN
from gateway.observability.trace_context import Headers, context_headers

EXPORT_TIMEOUT_SECONDS = 5.0
PROPAGATOR = TraceContextTextMapPropagator()

# Values of gen_ai.operation.name in https://github.com/open-telemetry/semantic-conventions-genai; that of any other
# endpoint is its own name, as the conventions have it for operations that they do not know.
OPERATIONS = {"chat.completions": "chat", "responses": "chat", "messages": "chat", "completions": "text_completion"}
ABSENT = frozenset({"none", UNKNOWN})

Attributes = dict[str, str | int | float | bool | tuple[str, ...]]


class SpanTrace:
    """The trace of a request that has a span of the gateway; `headers` name the span as the parent."""

    __slots__ = ("headers", "span")

    def __init__(self, span: Span, headers: Headers) -> None:
        self.span = span
        self.headers = headers

    def end(self, record: AccessRecord) -> None:
        """Set name and attributes and end the span; status 5xx and failed streams set the status ERROR."""
        if self.span.is_recording():
            self.span.update_name(span_name(record))
            self.span.set_attributes(attributes(record))
            if failed(record):
                self.span.set_status(Status(StatusCode.ERROR, record.code))
        self.span.end()


class SpanTracing:
    """Owns the tracer, the exporter and its thread while the `async with` block runs.

    `sample_share` is the sampling ratio of traces that start in the gateway; a client's sampled flag is respected.
    """

    def __init__(self, settings: TracingSettings) -> None:
        sampler = ParentBased(TraceIdRatioBased(settings.sample_share))
        resource = Resource.create({"service.name": "quantgate"})
        self._provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(f"{settings.endpoint}/v1/traces", timeout=EXPORT_TIMEOUT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("quantgate")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Export the remaining spans; in a thread, because it waits for the collector."""
        await asyncio.to_thread(self._provider.shutdown)

    def begin(self, endpoint: str, headers: Mapping[bytes, bytes]) -> SpanTrace:
        """Start a span named after the endpoint, as a child of the client's trace context if it is valid."""
        client_context = {name.decode(): value.decode() for name, value in context_headers(headers)}
        parent = PROPAGATOR.extract(client_context)
        span = self._tracer.start_span(endpoint, parent, SpanKind.SERVER)
        replica_context: dict[str, str] = {}
        PROPAGATOR.inject(replica_context, set_span_in_context(span, parent))
        return SpanTrace(span, tuple((name.encode(), value.encode()) for name, value in replica_context.items()))


def span_name(record: AccessRecord) -> str:
    """Return the name that the conventions ask for: operation and model."""
    operation = OPERATIONS.get(record.endpoint, record.endpoint)
    return operation if record.alias in ABSENT else f"{operation} {record.alias}"


def failed(record: AccessRecord) -> bool:
    """Return whether the gateway or a replica failed; for a server, a 4xx is no error."""
    return not record.code.isdecimal() or int(record.code) >= 500


def attributes(record: AccessRecord) -> Attributes:
    """Return a span's attributes: GenAI semantic conventions where they define one, `quantgate.*` otherwise.

    What is not known is left out.
    """
    result: Attributes = {
        "gen_ai.operation.name": OPERATIONS.get(record.endpoint, record.endpoint),
        "gen_ai.provider.name": "quantgate",
        "gen_ai.request.stream": record.stream,
        "quantgate.request_id": record.request_id,
        "quantgate.attempts": record.attempts,
        "quantgate.code": record.code,
        "quantgate.queued_seconds": record.queued_seconds,
    }
    if record.alias not in ABSENT:
        result["gen_ai.request.model"] = record.alias
    if record.code.isdecimal():
        result["http.response.status_code"] = int(record.code)
    if failed(record):
        result["error.type"] = record.code
    if record.external_cost_usd:
        result["quantgate.external_cost_usd"] = record.external_cost_usd
    return result if record.variant == "none" else result | _answer_attributes(record)


def _answer_attributes(record: AccessRecord) -> Attributes:
    """Attributes of a request that a replica was chosen for."""
    result: Attributes = {
        "gen_ai.response.model": record.variant,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "quantgate.variant": record.variant,
        "quantgate.precision": record.precision,
        "quantgate.replica": record.replica,
        "quantgate.reason": record.reason,
    }
    if record.reasoning_tokens:
        result["gen_ai.usage.reasoning.output_tokens"] = record.reasoning_tokens
    if record.finish != "none":
        result["gen_ai.response.finish_reasons"] = (record.finish,)
    if record.first_token_seconds is not None:
        result["gen_ai.response.time_to_first_chunk"] = record.first_token_seconds
    return result
