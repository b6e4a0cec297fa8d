"""Tracing as configured: propagation only, or OpenTelemetry spans (extra `otel`)."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module

from config.errors import ConfigError
from config.schema import TracingSettings
from gateway.observability.trace_context import NoTracing, Tracing


@asynccontextmanager
async def tracing(settings: TracingSettings | None) -> AsyncIterator[Tracing]:
    """Provide the configured tracing while the block runs; ConfigError if OpenTelemetry is not installed.

    None as `settings` turns spans off.
    """
    if settings is None:
        yield NoTracing()
        return
    try:
        # Imported only if tracing is configured: importing OpenTelemetry takes 0.5 s.
        module = import_module("gateway.observability.spans")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"gateway.tracing needs OpenTelemetry ({error}); run: pip install 'quantgate[otel]'"
        ) from error
    exporter: AbstractAsyncContextManager[Tracing] = module.SpanTracing(settings)
    async with exporter as span_tracing:
        yield span_tracing
