"""Server-sent events as bytes: cut a stream into whole events without ever holding more than one.

Wire format: https://html.spec.whatwg.org/multipage/server-sent-events.html; vLLM writes `data: {...}` and a blank
line, comments start with a colon.
"""

import msgspec

from gateway.errors import GatewayError, UpstreamDisconnected, error_body
from gateway.openai.endpoints import Endpoint

DONE = b"[DONE]"
KEEP_ALIVE = b": keep-alive\n\n"
LONGEST_EVENT_BYTES = 16 * 2**20


class EventSplitter:
    """Takes bytes as they arrive and gives back whole events, each with its blank line, unchanged."""

    __slots__ = ("_parts", "_size_bytes")

    def __init__(self) -> None:
        self._parts: list[bytes] = []  # of an event that isn't whole
        self._size_bytes = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Events that are whole now; the beginning of the next one stays until it is."""
        if not self._parts and 0 <= data.find(b"\n\n") == len(data) - 2 and b"\r" not in data:
            return [data]  # Nearly always: what arrives is one event.
        if not self._ends_within(data):
            self._size_bytes += len(data)
            self._parts.append(data)
            if self._size_bytes > LONGEST_EVENT_BYTES:
                raise UpstreamDisconnected("a replica sent an event without an end")
            return []
        buffer = b"".join((*self._parts, data)) if self._parts else data
        if b"\r" in buffer:
            # Kept back: a lone CR at the end may be half of a CRLF.
            half = buffer.endswith(b"\r")
            buffer = buffer[: len(buffer) - half].replace(b"\r\n", b"\n") + b"\r" * half
        *events, rest = buffer.split(b"\n\n")
        self._parts = [rest] if rest else []
        self._size_bytes = len(rest)
        if self._size_bytes > LONGEST_EVENT_BYTES:
            raise UpstreamDisconnected("a replica sent an event without an end")
        return [event + b"\n\n" for event in events]

    @property
    def rest(self) -> bytes:
        """What came after the last whole event."""
        return b"".join(self._parts)

    def _ends_within(self, data: bytes) -> bool:
        """Tell whether an event may end in new data: only then is all that waits looked through, and once."""
        if b"\n\n" in data or b"\n\r\n" in data:
            return True
        if not self._parts:
            return False
        # A blank line that begins in what is there; of four bytes of CRLF CRLF up to three are.
        last = self._parts[-1][-3:]
        if len(last) < 3 and len(self._parts) > 1:
            last = b"".join(self._parts[-4:])[-3:]
        border = last + data[:3]
        return b"\n\n" in border or b"\n\r\n" in border


def error_event(endpoint: Endpoint, error: GatewayError) -> bytes:
    """An error inside a stream that has begun, so that the SDK of each grammar raises instead of seeing an end."""
    if endpoint.takes_stream_options or not endpoint.generates:
        return b"data: " + error_body(error.message, error.type, error.param, error.code) + b"\n\n"
    detail = {"type": error.type, "message": error.message, "code": error.code, "param": error.param}
    told: dict[str, object] = {"type": "error", "error": detail}
    if endpoint.errors == "openai":
        told |= {"code": error.code, "message": error.message, "param": error.param, "sequence_number": 0}
    return b"event: error\ndata: " + msgspec.json.encode(told) + b"\n\n"


def event_data(event: bytes) -> bytes:
    """The payload of an event, b"" if it has none: a comment, or fields without data."""
    if event.startswith(b"data:") and event.find(b"\n") == len(event) - 2:
        return event[5:].strip()
    return b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))


def event_name(event: bytes) -> bytes:
    """What an event is called; b"" if it has no name."""
    if not event.startswith(b"event:"):
        return b""
    return event[6 : event.find(b"\n")].strip()


def is_comment(event: bytes) -> bool:
    """Tell whether an event is nothing but comments, which keep readers patient."""
    return all(line.startswith(b":") for line in event.split(b"\n") if line)
