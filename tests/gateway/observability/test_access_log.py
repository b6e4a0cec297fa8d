"""The access log: its line formats, when lines are written, and what happens if the reader stalls."""

import asyncio
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import msgspec
import pytest

from gateway.observability.access_log import (
    FLUSH_RECORDS,
    AccessLog,
    AccessLogLine,
    AccessRecord,
    LogFormat,
    format_json,
    format_logfmt,
)
from gateway.observability.metrics import Counter
from tests.fakes.running import ROOT, eventually
from tests.gateway.observability.records import RECORD

STAMP = "2026-01-02T03:04:05.750Z"


@dataclass(frozen=True, slots=True)
class Pipe:
    """Both ends of a pipe."""

    reading: BinaryIO
    writing: BinaryIO


@contextmanager
def pipe() -> Iterator[Pipe]:
    """Open a pipe: stderr often is one."""
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as reader, open(writing, "wb", buffering=0) as writer:  # noqa: PTH123
        yield Pipe(reader, writer)


def test_plain() -> None:
    """A line of logfmt has all fields in a fixed order."""
    assert format_logfmt(RECORD, STAMP).decode() == (
        f"ts={STAMP} request_id=r-1 key=team-a endpoint=chat.completions alias=smol variant=hi precision=bf16 "
        "replica=hi-1 reason=preferred code=200 attempts=1 queued_seconds=2.000 first_token_seconds=8.250 "
        "seconds=10.250 prompt_tokens=10 completion_tokens=3 estimated=0 finish=stop "
        "stream=1 reasoning_tokens=1 external_cost_usd=0\n"
    )


def test_no_first_token() -> None:
    """A missing first token is `none` in logfmt and null in JSON."""
    record = msgspec.structs.replace(RECORD, first_token_seconds=None)
    assert b" first_token_seconds=none " in format_logfmt(record, STAMP)
    assert json.loads(format_json(record, STAMP))["first_token_seconds"] is None


def test_json_lines_are_of_the_documented_schema() -> None:
    """A line decodes strictly as the type that gateway/README.md documents, field by field and in order."""
    line = msgspec.json.decode(format_json(RECORD, STAMP), type=AccessLogLine)
    assert line.ts == STAMP
    assert all(getattr(line, name) == getattr(RECORD, name) for name in RECORD.__struct_fields__)
    section = (ROOT / "gateway" / "README.md").read_text().partition("## Access log")[2].partition("## Code layout")[0]
    documented = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE)
    assert documented == list(schema_rows())
    assert [name for name, _, _ in documented] == list(json.loads(format_json(RECORD, STAMP)))


def schema_rows() -> Iterator[tuple[str, str, str]]:
    """Name, type and description of each field in the schema."""
    properties = msgspec.json.schema(AccessLogLine)["$defs"]["AccessLogLine"]["properties"]
    for name in ("ts", *AccessRecord.__struct_fields__):
        types = [each["type"] for each in properties[name].get("anyOf", [properties[name]])]
        yield name, " or ".join(types), properties[name]["description"]


def test_json() -> None:
    """A line of JSON is an object with the same fields."""
    assert json.loads(format_json(RECORD, STAMP)) == {"ts": STAMP, **msgspec.structs.asdict(RECORD)}


async def test_lines_are_written_together() -> None:
    """Lines are not written at once but together after a delay, in order, each with its own time."""
    with pipe() as through, AccessLog(through.writing, "plain", Counter()) as log:
        os.set_blocking(through.reading.fileno(), False)
        for number in range(3):
            log.append(RECORD, 1_767_323_045.75 + number)
        assert through.reading.read() is None
        lines = (await eventually(through.reading.read)).decode().splitlines()
    assert [line.split()[0][-7:-1] for line in lines] == ["05.750", "06.750", "07.750"]
    assert lines[0] == format_logfmt(RECORD, STAMP).decode().rstrip()


async def test_many_lines_are_written_at_once() -> None:
    """FLUSH_RECORDS lines are written without the delay, none of them split."""
    with pipe() as through, AccessLog(through.writing, "json", Counter()) as log:
        os.set_blocking(through.reading.fileno(), False)
        for number in range(FLUSH_RECORDS):
            log.append(RECORD, float(number))
        data = through.reading.read(2**20)
    assert len(data.splitlines()) == data.count(b"\n") > 0
    assert all(json.loads(line)["request_id"] == "r-1" for line in data.splitlines())


async def test_close_writes_the_backlog() -> None:
    """Lines that are not written yet are written when the block ends."""
    with pipe() as through:
        with AccessLog(through.writing, "plain", dropped := Counter()) as log:
            log.append(RECORD, 0.0)
        assert through.reading.read(4096).startswith(b"ts=1970-01-01T00:00:00.000Z request_id=r-1 ")
    assert dropped.value == 0


async def test_off() -> None:
    """With the format `off` nothing is written or dropped."""
    with pipe() as through:
        with AccessLog(through.writing, "off", dropped := Counter()) as log:
            log.append(RECORD, 0.0)
        through.writing.close()
        assert through.reading.read() == b""
    assert dropped.value == 0


@pytest.mark.parametrize("log_format", ["plain", "json"])
async def test_a_stalled_reader(log_format: LogFormat) -> None:
    """Records beyond the backlog are dropped and counted; the others are written in full once the reader reads."""
    dropped, count = Counter(), 1000
    with pipe() as through, AccessLog(through.writing, log_format, dropped, max_backlog=FLUSH_RECORDS) as log:
        for number in range(count):
            log.append(RECORD, float(number))
        assert 0 < dropped.value < count
        lines = await asyncio.to_thread(read_lines, through.reading, count - int(dropped.value))
    assert len(lines) + dropped.value == count
    assert all(line.endswith(b"_usd=0\n" if log_format == "plain" else b'_usd":0.0}\n') for line in lines)


def read_lines(reading: BinaryIO, count: int) -> list[bytes]:
    """Read a number of lines, as a log collector does."""
    data = b""
    while data.count(b"\n") < count:
        data += reading.read(65536)
    return data.splitlines(keepends=True)


async def test_a_closed_pipe() -> None:
    """Appending to a closed pipe does not raise; every line is counted as dropped."""
    with pipe() as through:
        through.reading.close()
        with AccessLog(through.writing, "plain", dropped := Counter()) as log:
            log.append(RECORD, 0.0)
            await eventually(lambda: dropped.value == 1)
            log.append(RECORD, 0.0)
    assert dropped.value == 2


async def test_close_with_a_stalled_reader() -> None:
    """Closing waits for a stalled reader for a limited time and counts the lines that were not written."""
    with pipe() as through:
        with AccessLog(through.writing, "plain", dropped := Counter()) as log:
            for _ in range(1000):
                log.append(RECORD, 0.0)
        assert dropped.value > 0
