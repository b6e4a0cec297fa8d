"""One line for each request when it ends: no prompt, no answer, nothing that a client made up but its checked id."""

import asyncio
import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import BinaryIO, Literal, Self

import msgspec
from msgspec import structs

from gateway.observability.metrics import Counter

Form = Literal["plain", "json", "off"]

FLUSH_BYTES = 64 * 2**10
FLUSH_SECONDS = 0.2
# A reader that stands still is waited for with this much; what comes then is dropped.
BACKLOG_BYTES = 2**20
# A pipe that polls as writable takes this much at once (PIPE_BUF of Linux), so a write of it never waits.
WRITE_BYTES = 4096
LAST_WAIT_SECONDS = 1.0

_JSON = msgspec.json.Encoder()


class AccessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is told of a request: `key` is the caller's name, `estimated` that completion tokens were counted here."""

    request_id: str
    key: str
    endpoint: str
    alias: str
    variant: str
    precision: str
    replica: str
    reason: str
    code: str
    attempts: int
    queued_seconds: float
    first_token_seconds: float | None
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    estimated: bool
    finish: str


LogSink = Callable[[AccessRecord, float], None]


def format_logfmt(entry: AccessRecord, stamp: str) -> bytes:
    """Write a line of logfmt."""
    first = entry.first_token_seconds
    return (
        f"ts={stamp} request_id={entry.request_id} key={entry.key} endpoint={entry.endpoint} "
        f"alias={entry.alias} variant={entry.variant} precision={entry.precision} replica={entry.replica} "
        f"reason={entry.reason} code={entry.code} attempts={entry.attempts} queued_seconds={entry.queued_seconds:.3f} "
        f"first_token_seconds={'none' if first is None else f'{first:.3f}'} seconds={entry.seconds:.3f} "
        f"prompt_tokens={entry.prompt_tokens} completion_tokens={entry.completion_tokens} "
        f"estimated={entry.estimated:d} finish={entry.finish}\n"
    ).encode()


def format_json(entry: AccessRecord, stamp: str) -> bytes:
    """Write a line of JSON, times to the microsecond."""
    first = entry.first_token_seconds
    rounded = structs.replace(
        entry,
        queued_seconds=round(entry.queued_seconds, 6),
        first_token_seconds=None if first is None else round(first, 6),
        seconds=round(entry.seconds, 6),
    )
    return b'{"ts":"' + stamp.encode() + b'",' + _JSON.encode(rounded)[1:] + b"\n"


@dataclass(slots=True, eq=False)
class AccessLog:
    """Gathers lines and writes them together; owns the writing to `stream` while the block runs.

    A request is never held up and never fails: who doesn't read in time misses lines, and `dropped` counts them.
    """

    stream: BinaryIO
    form: Form
    dropped: Counter
    backlog_bytes: int = BACKLOG_BYTES
    _lines: list[bytes] = field(default_factory=list)
    _bytes: int = 0
    _timer: asyncio.TimerHandle | None = None
    _second: int = -1
    _stamp: str = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what waits; a reader that stands still is given a last moment."""
        if self._timer:
            self._timer.cancel()
        self._flush(LAST_WAIT_SECONDS)
        self.dropped.inc(len(self._lines))
        self._lines.clear()

    def line(self, entry: AccessRecord, at_seconds: float) -> None:
        """Tell of a request that ended then, in seconds since 1970."""
        if self.form == "off":
            return
        if self._bytes >= self.backlog_bytes:
            self.dropped.inc()
            return
        line = (format_logfmt if self.form == "plain" else format_json)(entry, self._stamped(at_seconds))
        self._lines.append(line)
        self._bytes += len(line)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._due)
        elif self._bytes >= FLUSH_BYTES:
            self._flush()

    def _due(self) -> None:
        self._timer = None
        self._flush()
        if self._lines:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._due)

    def _flush(self, patience_seconds: float = 0.0) -> None:
        """Write as long as that doesn't wait for the reader, or not for longer than this."""
        descriptor, ready, until = self.stream.fileno(), select.poll(), time.monotonic() + patience_seconds
        ready.register(descriptor, select.POLLOUT)
        try:
            while self._lines and ready.poll(max(0.0, until - time.monotonic()) * 1000):
                count = _fitting(self._lines)
                piece = b"".join(self._lines[:count])
                written = os.write(descriptor, piece)
                self._bytes -= written
                self._lines[:count] = [piece[written:]] if written < len(piece) else []
        except BlockingIOError:
            pass  # somebody else filled it meanwhile
        except OSError:
            # Nobody reads any more, or the disk is full: requests go on, and the count tells.
            self.dropped.inc(len(self._lines))
            self._lines.clear()
            self._bytes = 0

    def _stamped(self, at_seconds: float) -> str:
        second = int(at_seconds)
        if second != self._second:
            self._second = second
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._stamp}.{int((at_seconds - second) * 1000):03d}Z"


def _fitting(lines: list[bytes]) -> int:
    """How many lines, at least one, are written at once."""
    size = 0
    for count, line in enumerate(lines):
        size += len(line)
        if size > WRITE_BYTES:
            return max(1, count)
    return len(lines)
