"""Server-sent events as bytes: cut a stream into whole events without ever holding more than one.

Wire format: https://html.spec.whatwg.org/multipage/server-sent-events.html; vLLM writes `data: {...}` and a blank
line, comments start with a colon.
"""

from gateway.errors import UpstreamDisconnected, error_body

DONE = b"[DONE]"
LONGEST_EVENT_BYTES = 16 * 2**20


class EventCutter:
    """Takes bytes as they arrive and gives back whole events, each with its blank line, unchanged."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Events that are whole now; the beginning of the next one stays until it is."""
        buffer = self._rest + data if self._rest else data
        if b"\r" in buffer:
            # Kept back: a lone CR at the end may be half of a CRLF.
            half = buffer.endswith(b"\r")
            buffer = buffer[: len(buffer) - half].replace(b"\r\n", b"\n") + b"\r" * half
        *events, self._rest = buffer.split(b"\n\n")
        if len(self._rest) > LONGEST_EVENT_BYTES:
            raise UpstreamDisconnected("a replica sent an event without an end")
        return [event + b"\n\n" for event in events]

    @property
    def rest(self) -> bytes:
        """What came after the last whole event."""
        return self._rest


def error_event(message: str, kind: str, code: str) -> bytes:
    """An error inside a stream that has begun; the OpenAI SDK raises APIError on it."""
    return b"data: " + error_body(message, kind, None, code) + b"\n\n"


def data_of(event: bytes) -> bytes:
    """The payload of an event, b"" if it has none: a comment, or fields without data."""
    if event.startswith(b"data:") and event.find(b"\n") == len(event) - 2:
        return event[5:].strip()
    return b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
