"""Tracing as configured: the client's trace context passed on, or spans of our own by OpenTelemetry (extra `otel`)."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module

from config.errors import ConfigError
from config.schema import TracingSettings
from gateway.observability.trace_context import Tracing, Untraced


@asynccontextmanager
async def tracing(settings: TracingSettings | None) -> AsyncIterator[Tracing]:
    """Trace as configured while the block runs; ConfigError if OpenTelemetry isn't installed."""
    if settings is None:
        yield Untraced()
        return
    try:
        # Only who traces pays for it: OpenTelemetry takes half a second to import.
        module = import_module("gateway.observability.spans")
    except ModuleNotFoundError as error:
        raise ConfigError(f"gateway.tracing needs OpenTelemetry ({error}); pip install 'quantgate[otel]'") from error
    spans: AbstractAsyncContextManager[Tracing] = module.Spans(settings)
    async with spans as began:
        yield began
