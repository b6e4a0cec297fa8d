"""Server-sent events as bytes: splits a stream into complete events and buffers at most one incomplete event.

Wire format: https://html.spec.whatwg.org/multipage/server-sent-events.html. vLLM writes `data: {...}` and a blank line;
comments start with a colon.
"""

import msgspec

from gateway.errors import GatewayError, UpstreamDisconnected, error_body
from gateway.openai.endpoints import Endpoint

DONE = b"[DONE]"
KEEP_ALIVE = b": keep-alive\n\n"
MAX_EVENT_BYTES = 16 * 2**20


class EventSplitter:
    """Splits received bytes into events, each with its blank line; CRLF becomes LF, nothing else changes."""

    __slots__ = ("_parts", "_size_bytes")

    def __init__(self) -> None:
        self._parts: list[bytes] = []  # of the incomplete event
        self._size_bytes = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that are complete now; raises UpstreamDisconnected beyond MAX_EVENT_BYTES."""
        if not self._parts and 0 <= data.find(b"\n\n") == len(data) - 2 and b"\r" not in data:
            return [data]  # The usual case: one read is one event.
        if not self._completes_event(data):
            self._size_bytes += len(data)
            self._parts.append(data)
            if self._size_bytes > MAX_EVENT_BYTES:
                raise UpstreamDisconnected(f"a replica sent an event of more than {MAX_EVENT_BYTES} bytes")
            return []
        buffer = b"".join((*self._parts, data)) if self._parts else data
        if b"\r" in buffer:
            # A CR at the end may be the first half of a CRLF, so it stays as it is.
            ends_in_cr = buffer.endswith(b"\r")
            buffer = buffer[: len(buffer) - ends_in_cr].replace(b"\r\n", b"\n") + b"\r" * ends_in_cr
        *events, rest = buffer.split(b"\n\n")
        self._parts = [rest] if rest else []
        self._size_bytes = len(rest)
        if self._size_bytes > MAX_EVENT_BYTES:
            raise UpstreamDisconnected(f"a replica sent an event of more than {MAX_EVENT_BYTES} bytes")
        return [event + b"\n\n" for event in events]

    @property
    def rest(self) -> bytes:
        """Bytes after the last complete event."""
        return b"".join(self._parts)

    def _completes_event(self, data: bytes) -> bool:
        """Whether a blank line may end in new data. Only then is the buffer searched, so each byte is searched once."""
        if b"\n\n" in data or b"\n\r\n" in data:
            return True
        if not self._parts:
            return False
        # A blank line that begins in the buffer: of the four bytes of CRLF CRLF at most three are there.
        last = self._parts[-1][-3:]
        if len(last) < 3 and len(self._parts) > 1:
            last = b"".join(self._parts[-4:])[-3:]
        boundary = last + data[:3]
        return b"\n\n" in boundary or b"\n\r\n" in boundary


def error_event(endpoint: Endpoint, error: GatewayError) -> bytes:
    """Encode an error as an event of a started stream, in the form on which the SDK of the endpoint's API raises."""
    if endpoint.takes_stream_options or not endpoint.generates:
        return b"data: " + error_body(error.message, error.type, error.param, error.code) + b"\n\n"
    kind = error.anthropic_type if endpoint.errors == "anthropic" else error.type
    detail = {"type": kind, "message": error.message, "code": error.code, "param": error.param}
    event: dict[str, object] = {"type": "error", "error": detail}
    if endpoint.errors == "openai":
        event |= {"code": error.code, "message": error.message, "param": error.param, "sequence_number": 0}
    return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"


def event_data(event: bytes) -> bytes:
    """Return the data of an event, b"" if it has none: a comment, or other fields only."""
    if event.startswith(b"data:") and event.find(b"\n") == len(event) - 2:
        return event[5:].strip()
    return b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))


def event_name(event: bytes) -> bytes:
    """Return the `event` field, b"" without one."""
    if not event.startswith(b"event:"):
        return b""
    return event[6 : event.find(b"\n")].strip()


def is_comment(event: bytes) -> bool:
    """Whether an event consists of comments only; servers send them as keep-alives."""
    return all(line.startswith(b":") for line in event.split(b"\n") if line)
