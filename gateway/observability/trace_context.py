"""W3C trace context of a request, passed on to replicas. Spec: https://www.w3.org/TR/trace-context/"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from gateway.observability.access_log import AccessRecord

Headers = tuple[tuple[bytes, bytes], ...]

# https://www.w3.org/TR/trace-context/#traceparent-header: what a later version appends stands behind a dash.
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-[\x21-\x7e]{0,200})?")
# A list of key=value; what is in it isn't our business as long as it can't end a header.
_TRACESTATE = re.compile(rb"[\x20-\x7e\t]{1,512}")


class Trace(Protocol):
    """One request's place in a trace."""

    @property
    def headers(self) -> Headers:
        """What every replica that is asked gets, so that its spans go below."""

    def end(self, entry: AccessRecord) -> None:
        """The request ended like this."""


class Tracing(Protocol):
    """Begins a trace for each request."""

    def begin(self, endpoint: str, headers: Mapping[bytes, bytes]) -> Trace:
        """Begin one, below what the client's headers say."""


@dataclass(frozen=True, slots=True)
class PassedOn:
    """A request that we have no span for: whoever traces client and replicas sees them linked all the same."""

    headers: Headers = ()

    def end(self, entry: AccessRecord) -> None:
        """Nothing is kept."""


NOT_TRACED = PassedOn()


@dataclass(frozen=True, slots=True)
class Untraced:
    """Tracing that is off."""

    def begin(self, endpoint: str, headers: Mapping[bytes, bytes]) -> Trace:  # noqa: ARG002 - Tracing says so
        """Pass the client's own trace on."""
        return PassedOn(context_headers(headers)) if b"traceparent" in headers else NOT_TRACED


def valid_traceparent(value: bytes) -> bool:
    """Tell whether a header is a trace context by the rules of W3C, of version 00 or a later one."""
    match = _TRACEPARENT.fullmatch(value)
    if match is None or match[1] == b"ff" or (match[1] == b"00" and match[4] is not None):
        return False
    return match[2].strip(b"0") != b"" and match[3].strip(b"0") != b""


def context_headers(headers: Mapping[bytes, bytes]) -> Headers:
    """Take a client's trace context as it is; without a well-formed `traceparent` there is none."""
    parent, state = headers.get(b"traceparent", b""), headers.get(b"tracestate", b"")
    if not valid_traceparent(parent):
        return ()
    kept = ((b"traceparent", parent),)
    return (*kept, (b"tracestate", state)) if _TRACESTATE.fullmatch(state) else kept
