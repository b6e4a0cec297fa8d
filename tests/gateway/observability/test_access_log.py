"""The line of a request: what it says, when it is written, and that nobody waits for it."""

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import msgspec
import pytest

from gateway.observability.access_log import FLUSH_BYTES, AccessLog, AccessRecord, Form, format_json, format_logfmt
from gateway.observability.metrics import Counter
from tests.fakes.running import eventually

STAMP = "2026-01-02T03:04:05.750Z"
ENTRY = AccessRecord(
    request_id="r-1",
    key="team-a",
    endpoint="chat.completions",
    alias="smol",
    variant="hi",
    precision="bf16",
    replica="hi-1",
    reason="preferred",
    code="200",
    attempts=1,
    queued_seconds=2.0,
    first_token_seconds=8.25,
    seconds=10.25,
    prompt_tokens=10,
    completion_tokens=3,
    estimated=False,
    finish="stop",
)


@dataclass(frozen=True, slots=True)
class Pipe:
    """Both ends of a pipe."""

    reading: BinaryIO
    writing: BinaryIO


@contextmanager
def pipe() -> Iterator[Pipe]:
    """A pipe, as stderr often is one."""
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as reader, open(writing, "wb", buffering=0) as writer:  # noqa: PTH123
        yield Pipe(reader, writer)


def test_plain() -> None:
    """Key=value, in an order that a person can read."""
    assert format_logfmt(ENTRY, STAMP).decode() == (
        f"ts={STAMP} request_id=r-1 key=team-a endpoint=chat.completions alias=smol variant=hi precision=bf16 "
        "replica=hi-1 reason=preferred code=200 attempts=1 queued_seconds=2.000 first_token_seconds=8.250 "
        "seconds=10.250 prompt_tokens=10 completion_tokens=3 estimated=0 finish=stop\n"
    )


def test_nobody_answered() -> None:
    """What there is not is `none` in plain lines and null in JSON."""
    entry = msgspec.structs.replace(ENTRY, first_token_seconds=None)
    assert b" first_token_seconds=none " in format_logfmt(entry, STAMP)
    assert json.loads(format_json(entry, STAMP))["first_token_seconds"] is None


def test_json() -> None:
    """The same, an object a line."""
    assert json.loads(format_json(ENTRY, STAMP)) == {"ts": STAMP, **msgspec.structs.asdict(ENTRY)}


async def test_lines_are_written_together() -> None:
    """A line waits a moment for others; then all are there, in order, with the time of each."""
    with pipe() as through, AccessLog(through.writing, "plain", Counter()) as log:
        os.set_blocking(through.reading.fileno(), False)
        for number in range(3):
            log.line(ENTRY, 1_767_323_045.75 + number)
        assert through.reading.read() is None
        lines = (await eventually(through.reading.read)).decode().splitlines()
    assert [line.split()[0][-7:-1] for line in lines] == ["05.750", "06.750", "07.750"]
    assert lines[0] == format_logfmt(ENTRY, STAMP).decode().rstrip()


async def test_many_lines_are_not_waited_for() -> None:
    """As soon as enough of them are there they are written, each one whole."""
    with pipe() as through, AccessLog(through.writing, "json", Counter()) as log:
        os.set_blocking(through.reading.fileno(), False)
        for number in range(FLUSH_BYTES // len(format_json(ENTRY, STAMP)) + 1):
            log.line(ENTRY, float(number))
        first = through.reading.read(2 * FLUSH_BYTES)
    assert all(json.loads(line)["request_id"] == "r-1" for line in first.splitlines())


async def test_the_end() -> None:
    """What still waits is written when the block ends."""
    with pipe() as through:
        with AccessLog(through.writing, "plain", dropped := Counter()) as log:
            log.line(ENTRY, 0.0)
        assert through.reading.read(4096).startswith(b"ts=1970-01-01T00:00:00.000Z request_id=r-1 ")
    assert dropped.value == 0


async def test_off() -> None:
    """Nothing is written, and nothing kept."""
    with pipe() as through:
        with AccessLog(through.writing, "off", Counter()) as log:
            log.line(ENTRY, 0.0)
        through.writing.close()
        assert through.reading.read() == b""


@pytest.mark.parametrize("form", ["plain", "json"])
async def test_a_reader_that_stands_still(form: Form) -> None:
    """Requests go on; what the backlog can't take is dropped and counted, and no line is torn."""
    dropped, told = Counter(), 4 * FLUSH_BYTES // len(format_json(ENTRY, STAMP))
    with pipe() as through, AccessLog(through.writing, form, dropped, backlog_bytes=FLUSH_BYTES) as log:
        for number in range(told):
            log.line(ENTRY, float(number))
        assert 0 < dropped.value < told
        lines = await asyncio.to_thread(read_lines, through.reading, told - int(dropped.value))
    assert len(lines) + dropped.value == told
    assert all(line.endswith(b"finish=stop\n" if form == "plain" else b'"finish":"stop"}\n') for line in lines)


def read_lines(reading: BinaryIO, count: int) -> list[bytes]:
    """Read as a log collector does."""
    data = b""
    while data.count(b"\n") < count:
        data += reading.read(65536)
    return data.splitlines(keepends=True)


async def test_a_reader_that_has_gone() -> None:
    """A broken pipe breaks no request; each line that nobody gets is counted."""
    with pipe() as through:
        through.reading.close()
        with AccessLog(through.writing, "plain", dropped := Counter()) as log:
            log.line(ENTRY, 0.0)
            await eventually(lambda: dropped.value == 1)
            log.line(ENTRY, 0.0)
    assert dropped.value == 2


async def test_a_stuck_reader_at_the_end() -> None:
    """The end waits a moment for who doesn't read, no longer, and counts what stays unsaid."""
    with pipe() as through:
        with AccessLog(through.writing, "plain", dropped := Counter()) as log:
            for _ in range(1000):
                log.line(ENTRY, 0.0)
        assert dropped.value > 0
