"""Spans by OpenTelemetry, one a request; its own thread sends them, so a collector that is slow or gone costs nothing.

Imported only where tracing is configured.
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
from gateway.observability.trace_context import Headers, context_headers

EXPORT_TIMEOUT_SECONDS = 5.0
CONTEXT = TraceContextTextMapPropagator()

# https://github.com/open-telemetry/semantic-conventions-genai, gen_ai.operation.name
OPERATIONS = {"chat.completions": "chat", "completions": "text_completion"}


class SpanTrace:
    """A request with a span."""

    __slots__ = ("headers", "span")

    def __init__(self, span: Span, headers: Headers) -> None:
        self.span = span
        self.headers = headers

    def end(self, entry: AccessRecord) -> None:
        """Say how the request ended; the span is sent later."""
        if self.span.is_recording():
            self.span.set_attributes(attributes(entry))
            if not entry.code.isdecimal() or int(entry.code) >= 500:
                self.span.set_status(Status(StatusCode.ERROR, entry.code))
        self.span.end()


class Spans:
    """Owns the exporter and its thread while the `async with` block runs.

    `sample_share` of the traces that begin here are kept; of a client's, those that the client keeps.
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
        """Send what is left."""
        await asyncio.to_thread(self._provider.shutdown)

    def begin(self, endpoint: str, headers: Mapping[bytes, bytes]) -> SpanTrace:
        """Begin a span below the client's."""
        told = {name.decode(): value.decode() for name, value in context_headers(headers)}
        parent = CONTEXT.extract(told)
        span = self._tracer.start_span(endpoint, parent, SpanKind.SERVER)
        passed: dict[str, str] = {}
        CONTEXT.inject(passed, set_span_in_context(span, parent))
        return SpanTrace(span, tuple((name.encode(), value.encode()) for name, value in passed.items()))


def attributes(entry: AccessRecord) -> dict[str, str | int | float | tuple[str, ...]]:
    """Describe a request in the words of the GenAI conventions; what they have no word for is ours."""
    told: dict[str, str | int | float | tuple[str, ...]] = {
        "gen_ai.operation.name": OPERATIONS.get(entry.endpoint, entry.endpoint),
        "gen_ai.provider.name": "quantgate",
        "gen_ai.request.model": entry.alias,
        "gen_ai.response.model": entry.variant,
        "gen_ai.response.finish_reasons": (entry.finish,),
        "gen_ai.usage.input_tokens": entry.prompt_tokens,
        "gen_ai.usage.output_tokens": entry.completion_tokens,
        "quantgate.request_id": entry.request_id,
        "quantgate.variant": entry.variant,
        "quantgate.precision": entry.precision,
        "quantgate.replica": entry.replica,
        "quantgate.reason": entry.reason,
        "quantgate.attempts": entry.attempts,
        "quantgate.code": entry.code,
        "quantgate.queued_seconds": entry.queued_seconds,
    }
    if entry.first_token_seconds is not None:
        told["gen_ai.response.time_to_first_chunk"] = entry.first_token_seconds
    return told
