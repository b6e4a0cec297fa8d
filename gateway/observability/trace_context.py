"""Propagation of a client's W3C trace context to replicas. Specification: https://www.w3.org/TR/trace-context/"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from gateway.observability.access_log import AccessRecord

Headers = tuple[tuple[bytes, bytes], ...]

# https://www.w3.org/TR/trace-context/#traceparent-header: later versions may append fields after a dash.
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-[\x21-\x7e]{0,200})?")
# A list of key=value. Its content is opaque here; the pattern only excludes bytes that could end a header line.
_TRACESTATE = re.compile(rb"[\x20-\x7e\t]{1,512}")


class Trace(Protocol):
    """The trace of one request."""

    @property
    def headers(self) -> Headers:
        """Headers to add to the request to a replica; they make the replica's spans children of this trace."""

    def end(self, record: AccessRecord) -> None:
        """Called once, when the request has ended."""


class Tracing(Protocol):
    """Starts the trace of each request."""

    def begin(self, endpoint: str, headers: Mapping[bytes, bytes]) -> Trace:
        """Start a trace as a child of the client's trace context; `headers` are the client's, in lower case."""


@dataclass(frozen=True, slots=True)
class PropagatedTrace:
    """A request without a span of the gateway: the client's trace context reaches the replica unchanged."""

    headers: Headers = ()

    def end(self, record: AccessRecord) -> None:
        """Do nothing."""


NOT_TRACED = PropagatedTrace()


@dataclass(frozen=True, slots=True)
class NoTracing:
    """Tracing without spans: `gateway.tracing` is not configured."""

    def begin(self, endpoint: str, headers: Mapping[bytes, bytes]) -> Trace:  # noqa: ARG002 - protocol Tracing
        """Propagate the client's trace context, if there is one."""
        return PropagatedTrace(context_headers(headers)) if b"traceparent" in headers else NOT_TRACED


def valid_traceparent(value: bytes) -> bool:
    """Return whether a header value is a valid `traceparent` of version 00 or a later one."""
    match = _TRACEPARENT.fullmatch(value)
    if match is None or match[1] == b"ff" or (match[1] == b"00" and match[4] is not None):
        return False
    return match[2].strip(b"0") != b"" and match[3].strip(b"0") != b""


def context_headers(headers: Mapping[bytes, bytes]) -> Headers:
    """Return `traceparent` and a valid `tracestate`; empty if `traceparent` is absent or invalid."""
    parent, state = headers.get(b"traceparent", b""), headers.get(b"tracestate", b"")
    if not valid_traceparent(parent):
        return ()
    traceparent = (b"traceparent", parent)
    return (traceparent, (b"tracestate", state)) if _TRACESTATE.fullmatch(state) else (traceparent,)
