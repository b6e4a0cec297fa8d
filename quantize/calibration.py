"""Calibration text: JSONL of chats, checked line by line, split by content, drawn by seed. No tokenizer here."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from config.manifest import sha256_of
from quantize.errors import CalibrationError

# A Hessian from fewer chats than this follows their quirks.
FEWEST_SAMPLES = 16
FEWEST_HELD_OUT = 4
_PROBLEMS_SHOWN = 10
_ROLES = ("assistant", "developer", "system", "tool", "user")
_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One chat, where it was read, and the sha256 of what it says."""

    messages: tuple[Message, ...]
    where: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """A calibration file and its digest."""

    path: Path
    sha256: str


@dataclass(frozen=True, slots=True)
class Draw:
    """The rows to calibrate on, and those to evaluate on, which calibration never sees; both in order of use."""

    calibration: tuple[Row, ...]
    held_out: tuple[Row, ...]


def shipped_files() -> list[Path]:
    """List the calibration files that come with this package."""
    return sorted(_DATA.glob("*.jsonl"))


def read_sources(paths: Sequence[Path]) -> tuple[tuple[Source, ...], tuple[Row, ...]]:
    """Read JSONL files of `{"messages": [{"role", "content"}]}`; CalibrationError lists up to ten broken lines."""
    missing = [f"{path}: no such calibration file" for path in paths if not path.is_file()]
    if missing:
        raise CalibrationError(missing)
    parsed = list(chain.from_iterable(_parse_file(path) for path in paths))
    problems = list(islice((item for item in parsed if isinstance(item, str)), _PROBLEMS_SHOWN))
    if problems:
        raise CalibrationError(problems)
    rows = {item.sha256: item for item in parsed if isinstance(item, Row)}
    return tuple(Source(path, sha256_of(path)) for path in paths), tuple(rows.values())


def draw(rows: Iterable[Row], *, samples: int, seed: int) -> Draw:
    """Split rows by content and put each side in the seed's order; CalibrationError where too few remain."""
    ordered = sorted(rows, key=lambda row: _shuffled(row, seed))
    held_out = tuple(row for row in ordered if is_held_out(row))
    usable = tuple(row for row in ordered if not is_held_out(row))
    if len(usable) < FEWEST_SAMPLES or len(held_out) < FEWEST_HELD_OUT:
        raise CalibrationError(
            [
                f"too few calibration rows: {len(ordered)} different chats give {len(usable)} to calibrate on and "
                f"{len(held_out)} to evaluate on, at least {FEWEST_SAMPLES} and {FEWEST_HELD_OUT} are needed; "
                f"pass more text with --data",
            ],
        )
    return Draw(calibration=usable[:samples], held_out=held_out)


def is_held_out(row: Row) -> bool:
    """Keep about a third of all contents out of calibration, by content and so for every seed and file alike."""
    return int(row.sha256[:8], 16) % 3 == 0


def contents_digest(rows: Iterable[str]) -> str:
    """Digest the sha256 sums of rows, in their order of use."""
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def parse_line(line: str, where: str) -> Row | str:
    """Turn one line into a row, or into the problem it has."""
    try:
        value = json.loads(line)
    except ValueError as error:
        return f"{where}: not JSON: {error}"
    if not isinstance(value, dict) or "messages" not in value:
        return f'{where}: has no "messages"; a line is {{"messages": [{{"role": ..., "content": ...}}]}}'
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        return f'{where}: "messages" is empty or no list'
    for position, message in enumerate(messages, 1):
        problem = _message_problem(message)
        if problem:
            return f"{where}: message {position}: {problem}"
    turns = tuple(Message(message["role"], message["content"]) for message in messages)
    return Row(turns, where, _content_sha256(turns))


def _parse_file(path: Path) -> Iterator[Row | str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                yield f"{where}: not UTF-8: {error.reason} at byte {error.start}"
                continue
            if text.strip():
                yield parse_line(text, where)


def _message_problem(message: Any) -> str:
    if not isinstance(message, dict):
        return "is no object"
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        return f"role {role!r} is none of {', '.join(_ROLES)}"
    if not isinstance(content, str) or not content.strip():
        return '"content" is empty or no text'
    return ""


def _content_sha256(messages: tuple[Message, ...]) -> str:
    told = json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False)
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()


def _shuffled(row: Row, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{row.sha256}".encode()).hexdigest()
