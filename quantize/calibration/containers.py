"""Calibration files as they lie on disk -> their rows: JSON lines, JSON arrays and parquet, compressed or not."""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from quantize.errors import CalibrationError

# First bytes of a file, what they mean, and how to read through it.
_COMPRESSIONS: Mapping[bytes, tuple[str, Callable[[Path], Any]]] = MappingProxyType(
    {b"\x1f\x8b": ("gzip", gzip.open), b"BZh": ("bzip2", bz2.open), b"\xfd7zXZ\x00": ("xz", lzma.open)}
)
_UNREADABLE: Mapping[bytes, str] = MappingProxyType(
    {
        b"PK\x03\x04": "is a zip archive; unpack it",
        b"\x28\xb5\x2f\xfd": "is compressed by zstd; decompress it (zstd -d)",
        b"ARROW1": "is an Arrow file; save it as parquet (Dataset.to_parquet)",
    }
)
_PARQUET = b"PAR1"
# The longer mark of UTF-32 begins with that of UTF-16.
_BYTE_ORDER_MARKS = ((b"\xff\xfe\x00\x00", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_UTF8_MARK = b"\xef\xbb\xbf"
_HEAD_BYTES = 65_536
_TABLES = frozenset({".csv", ".tsv"})
_TEXTS = frozenset({".txt", ".md"})
_JSON = 'write one JSON object a line, like {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'
_PARQUET_ROWS = 1000
_NAMED = 3


@dataclass(frozen=True, slots=True)
class RawRecord:
    """A row as it was read, or the problem that it has; `where` names file and line, or file and row."""

    where: str
    value: Any = None
    problem: str = ""


def read_records(path: Path) -> tuple[str, Iterator[RawRecord]]:
    """Open a file of rows; returns the kind of the file, and its rows.

    CalibrationError, here or on the way, if it can't be read as a whole: one line with the reason.
    """
    if path.is_dir():
        raise CalibrationError([_directory_line(path)])
    if not path.is_file():
        raise CalibrationError([f"{path}: no such calibration file"])
    with _readable(path), path.open("rb") as file:
        magic = file.read(8)
    reason = next((reason for start, reason in _UNREADABLE.items() if magic.startswith(start)), None)
    if reason:
        raise CalibrationError([f"{path}: {reason}"])
    if magic.startswith(_PARQUET):
        return "parquet", _parquet_records(path)
    name, opened = next((entry for start, entry in _COMPRESSIONS.items() if magic.startswith(start)), ("", _plain))
    with _readable(path), opened(path) as file:
        head = file.read(_HEAD_BYTES)
    kind, records = _json_records(path, head, opened)
    return f"{kind} ({name})" if name else kind, records


def _plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _json_records(path: Path, head: bytes, opened: Callable[[Path], IO[bytes]]) -> tuple[str, Iterator[RawRecord]]:
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if head.startswith(mark)), "")
    start = head.decode(encoding or "utf-8", "ignore").lstrip("\ufeff").lstrip()
    if not start:
        raise CalibrationError([f"{path}: is empty"])
    if start[0] not in "[{":
        _require_json(path)
    if start[0] == "[" and not _is_line_of_lists(start):
        return "JSON array", _array_records(path, encoding, opened)
    lines = _decoded_lines(path, encoding, opened) if encoding else _lines(path, opened)
    return "JSON lines", _line_records(path, lines)


def _require_json(path: Path) -> None:
    """Refuse tables and plain text, which are not JSON on any line."""
    suffixes = {suffix.lower() for suffix in path.suffixes[-2:]}
    if suffixes & _TABLES:
        raise CalibrationError([f"{path}: is a table of {path.suffix.lstrip('.')}, not JSON; {_JSON}"])
    if suffixes & _TEXTS:
        raise CalibrationError([f"{path}: is plain text, not JSON; {_JSON}"])


def _is_line_of_lists(start: str) -> bool:
    """Whether the first line alone is a list, and another one follows: one chat a line, without a key."""
    first, _, rest = start.partition("\n")
    try:
        return isinstance(json.loads(first), list) and rest.lstrip().startswith("[")
    except ValueError:
        return False


def _line_records(path: Path, lines: Iterator[tuple[int, bytes]]) -> Iterator[RawRecord]:
    with _readable(path):
        for number, line in lines:
            where = f"{path}:{number}"
            try:
                text = line.decode()
                if text.strip():
                    yield RawRecord(where, json.loads(text))
            except UnicodeDecodeError as error:
                yield RawRecord(where, problem=f"not UTF-8: {error.reason} at byte {error.start}")
            except (ValueError, RecursionError) as error:
                yield RawRecord(where, problem=f"not JSON: {error}")


def _lines(path: Path, opened: Callable[[Path], IO[bytes]]) -> Iterator[tuple[int, bytes]]:
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            yield number, line.removeprefix(_UTF8_MARK) if number == 1 else line


def _decoded_lines(path: Path, encoding: str, opened: Callable[[Path], IO[bytes]]) -> Iterator[tuple[int, bytes]]:
    """Lines of a file in another encoding, as UTF-8."""
    for number, line in enumerate(io.StringIO(_text_of(path, encoding, opened)), 1):
        yield number, line.encode("utf-8", "surrogatepass")


def _array_records(path: Path, encoding: str, opened: Callable[[Path], IO[bytes]]) -> Iterator[RawRecord]:
    text = _text_of(path, encoding, opened)
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError([f"{path}: begins like a JSON array, and is none: {error}"]) from None
    for number, item in enumerate(items, 1):
        yield RawRecord(f"{path}: item {number}", item)


def _text_of(path: Path, encoding: str, opened: Callable[[Path], IO[bytes]]) -> str:
    with _readable(path), opened(path) as file:
        data = file.read()
    try:
        return data.decode(encoding or "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        problem = f"{path}: not {encoding or 'UTF-8'}: {error.reason} in line {line}; save it as UTF-8"
        raise CalibrationError([problem]) from None


def _parquet_records(path: Path) -> Iterator[RawRecord]:
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415
    except ImportError:
        raise CalibrationError([f"{path}: reading parquet needs pyarrow; pip install pyarrow"]) from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for number, row in enumerate(batch.to_pylist(), number + 1):  # noqa: B020
                    yield RawRecord(f"{path}: row {number}", _without_nulls(row))
    except (OSError, ValueError, ArrowException) as error:
        raise CalibrationError([f"{path}: damaged parquet: {_first_line(error)}"]) from None


def _without_nulls(value: Any) -> Any:
    """Drop nulls: all rows of a parquet column have the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what can go wrong with a file's bytes into one line."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise CalibrationError([f"{path}: its compressed data is damaged: {_first_line(error)}"]) from None
    except OSError as error:
        raise CalibrationError([f"{path}: can't be read: {error.strerror or error}"]) from None


def _directory_line(path: Path) -> str:
    suffixes = {".jsonl", ".json", ".parquet", ".gz"}
    files = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
    inside = ", ".join(str(file.relative_to(path)) for file in files[:_NAMED])
    found = f"it holds {inside}{', ...' if len(files) > _NAMED else ''}" if files else "it holds no JSON or parquet"
    return f"{path}: is a directory, --data takes files; {found}"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
