"""Access log: one line per completed request, without prompts, responses or other text from the client.

The only value that a client supplies is the request id, which has been validated.
"""

import asyncio
import os
import select
import stat
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Annotated, BinaryIO, Literal, Self

import msgspec
from msgspec import structs

from gateway.observability.metrics import Counter

LogFormat = Literal["plain", "json", "off"]

FLUSH_SECONDS = 0.2
FLUSH_RECORDS = 200
# About 1 MiB of records in memory, or of lines.
MAX_BACKLOG_RECORDS = 3000
# PIPE_BUF of Linux: a pipe that polls as writable accepts this many bytes, so writing them does not block.
WRITE_BYTES = 4096
MAX_FILE_WRITE_BYTES = 64 * 2**10
SHUTDOWN_WAIT_SECONDS = 1.0

_JSON = msgspec.json.Encoder()


def _described(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class AccessRecord(msgspec.Struct, frozen=True, gc=False):
    """One completed request. Text that does not apply is "none"."""

    request_id: Annotated[str, _described("the `x-request-id` of the response")]
    key: Annotated[str, _described("name of the API key")]
    endpoint: Annotated[
        str, _described("`chat.completions`, `completions`, `responses`, `messages`, `embeddings`, ...")
    ]
    alias: Annotated[str, _described("the requested model; `_unknown` if it is not configured")]
    variant: Annotated[str, _described("the variant that answered")]
    precision: Annotated[str, _described("its precision: `bf16`, `int8`, `int4`, ...")]
    replica: Annotated[str, _described("the replica that answered, the last one that was tried")]
    reason: Annotated[str, _described("why this variant, as in `x-quantgate-reason`")]
    code: Annotated[str, _described("HTTP status, `499` if the client left, or an error code if a stream broke off")]
    attempts: Annotated[int, _described("replicas that were asked")]
    queued_seconds: Annotated[float, _described("time in the queue for a replica")]
    first_token_seconds: Annotated[float | None, _described("time to the first streamed token; null if there was none")]
    seconds: Annotated[float, _described("time from the arrival of the request to the last byte of the response")]
    prompt_tokens: Annotated[int, _described("tokens of the prompt, by the engine's count")]
    completion_tokens: Annotated[int, _described("generated tokens, reasoning included")]
    estimated: Annotated[bool, _described("the engine reported no usage, and streamed events were counted instead")]
    finish: Annotated[str, _described("`stop`, `length`, `tool_calls`, `content_filter`, `abort`, `other`, ...")]
    stream: Annotated[bool, _described("the client asked for a stream")]
    reasoning_tokens: Annotated[int, _described("generated tokens of reasoning, where the engine counts them")]
    external_cost_usd: Annotated[float, _described("what a provider outside charges for the answer")]


class AccessLogLine(AccessRecord, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """A line of the access log in JSON."""

    ts: Annotated[str, _described("when the request ended: RFC 3339, UTC, milliseconds")]


# The fields of a record in their order, formatted in one step; `%.0s` skips the time of a token that never came.
_STREAMED = (
    "ts=%s request_id=%s key=%s endpoint=%s alias=%s variant=%s precision=%s replica=%s reason=%s code=%s attempts=%d "
    "queued_seconds=%.3f first_token_seconds=%.3f seconds=%.3f prompt_tokens=%d completion_tokens=%d estimated=%d "
    "finish=%s stream=%d reasoning_tokens=%d external_cost_usd=%g\n"
)
_UNSTREAMED = _STREAMED.replace("first_token_seconds=%.3f", "first_token_seconds=none%.0s")

# Takes a record and the time at which the request ended, in seconds since 1970.
LogSink = Callable[[AccessRecord, float], None]


def both(first: LogSink, second: LogSink) -> LogSink:
    """Return a sink that passes each record to two others."""

    def sink(record: AccessRecord, at_seconds: float) -> None:
        first(record, at_seconds)
        second(record, at_seconds)

    return sink


def format_logfmt(record: AccessRecord, timestamp: str) -> bytes:
    """Format a record as a line of logfmt, durations in milliseconds precision."""
    template = _UNSTREAMED if record.first_token_seconds is None else _STREAMED
    return (template % (timestamp, *structs.astuple(record))).encode()


def format_json(record: AccessRecord, timestamp: str) -> bytes:
    """Format a record as a line of JSON, durations in microseconds precision."""
    first = record.first_token_seconds
    rounded = structs.replace(
        record,
        queued_seconds=round(record.queued_seconds, 6),
        first_token_seconds=None if first is None else round(first, 6),
        seconds=round(record.seconds, 6),
    )
    return b'{"ts":"' + timestamp.encode() + b'",' + _JSON.encode(rounded)[1:] + b"\n"


@dataclass(slots=True, eq=False)
class AccessLog:
    """Buffers records while the block runs, and writes their lines to `stream` every FLUSH_SECONDS or FLUSH_RECORDS.

    Appending neither waits nor fails. Records are formatted when they are written. If the reader of `stream` stalls, up
    to `max_backlog` records are kept and further ones dropped; `dropped` counts lines that were never written in full.
    """

    stream: BinaryIO
    format: LogFormat
    dropped: Counter
    max_backlog: int = MAX_BACKLOG_RECORDS
    _records: deque[tuple[AccessRecord, float]] = field(default_factory=deque)
    # Formatted lines that are not written yet: at most one write and one line.
    _lines: list[bytes] = field(default_factory=list)
    _timer: asyncio.TimerHandle | None = None
    _max_write_bytes: int = WRITE_BYTES
    _second: int = -1
    _second_text: str = ""

    def __enter__(self) -> Self:
        # Only a write to a pipe must not be longer than PIPE_BUF to be atomic.
        if stat.S_ISREG(os.fstat(self.stream.fileno()).st_mode):
            self._max_write_bytes = MAX_FILE_WRITE_BYTES
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the backlog; a stalled reader is waited for at most SHUTDOWN_WAIT_SECONDS."""
        if self._timer:
            self._timer.cancel()
        self._flush(SHUTDOWN_WAIT_SECONDS)
        self._drop_backlog()

    def append(self, record: AccessRecord, at_seconds: float) -> None:
        """Log a request that ended at `at_seconds` since 1970."""
        if self.format == "off":
            return
        records = self._records
        if len(records) >= self.max_backlog:
            self.dropped.inc()
            return
        records.append((record, at_seconds))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._on_timer)
        elif not len(records) % FLUSH_RECORDS:
            self._flush()

    def _on_timer(self) -> None:
        self._timer = None
        self._flush()
        if self._records or self._lines:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._on_timer)

    def _flush(self, wait_seconds: float = 0.0) -> None:
        """Write until the backlog is empty or writing would block for longer than `wait_seconds` in total."""
        descriptor, poller, deadline = self.stream.fileno(), select.poll(), time.monotonic() + wait_seconds
        poller.register(descriptor, select.POLLOUT)
        try:
            while (self._records or self._lines) and poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                self._write_chunk(descriptor)
        except BlockingIOError:
            pass  # another process that shares the pipe filled it after the poll
        except OSError:
            # The reader has closed the pipe, or the disk is full. Requests go on; the counter shows the loss.
            self._drop_backlog()

    def _write_chunk(self, descriptor: int) -> None:
        """Format and write as many whole lines as one write may have, at least one."""
        records, lines = self._records, self._lines
        format_line = format_logfmt if self.format == "plain" else format_json
        size = sum(map(len, lines))
        while records and size < self._max_write_bytes:
            record, at_seconds = records.popleft()
            line = format_line(record, self._timestamp(at_seconds))
            lines.append(line)
            size += len(line)
        count = len(lines) if size <= self._max_write_bytes or len(lines) == 1 else len(lines) - 1
        chunk = b"".join(lines[:count])
        written = os.write(descriptor, chunk)
        lines[:count] = [chunk[written:]] if written < len(chunk) else []

    def _timestamp(self, at_seconds: float) -> str:
        """Format a time as RFC 3339 in UTC with milliseconds."""
        second = int(at_seconds)
        if second != self._second:
            self._second = second
            self._second_text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._second_text}.{int((at_seconds - second) * 1000):03d}Z"

    def _drop_backlog(self) -> None:
        self.dropped.inc(len(self._lines) + len(self._records))
        self._lines.clear()
        self._records.clear()
