"""Files are read as they lie on disk, or refused in one line."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize.calibration.containers import read_records
from quantize.calibration.datasets import read_datasets
from quantize.errors import CalibrationError
from tests.quantize.chats import chat

CHATS = [{**chat(number), "note": "ü“"} for number in range(3)]
LINES = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in CHATS)
ARRAY = json.dumps(CHATS, ensure_ascii=False)


@pytest.mark.parametrize(
    "name,data,kind",
    [
        ("a.jsonl", LINES.encode(), "JSON lines"),
        ("a.jsonl", LINES.replace("\n", "\r\n").encode(), "JSON lines"),
        ("a.jsonl", LINES.replace("\n", "\n\n \n").encode(), "JSON lines"),
        ("a.jsonl", LINES.rstrip().encode(), "JSON lines"),
        ("a.jsonl", LINES.encode("utf-8-sig"), "JSON lines"),
        ("a.jsonl", LINES.encode("utf-16"), "JSON lines"),
        ("a.jsonl", b"\xfe\xff" + LINES.encode("utf-16-be"), "JSON lines"),
        ("a.jsonl", LINES.encode("utf-32"), "JSON lines"),
        ("a.txt", LINES.encode(), "JSON lines"),
        ("a.json", ARRAY.encode(), "JSON array"),
        ("a.json", json.dumps(CHATS, indent=2).encode("utf-8-sig"), "JSON array"),
        ("a.json", ARRAY.encode("utf-16"), "JSON array"),
        ("a.jsonl", b"\n  " + ARRAY.encode(), "JSON array"),
        ("a.jsonl.gz", gzip.compress(LINES.encode()), "JSON lines (gzip)"),
        ("a.jsonl", gzip.compress(ARRAY.encode()), "JSON array (gzip)"),
        ("a.jsonl.bz2", bz2.compress(LINES.encode()), "JSON lines (bzip2)"),
        ("a.jsonl.xz", lzma.compress(LINES.encode()), "JSON lines (xz)"),
        (
            "a.jsonl",
            "".join(json.dumps(one["messages"]) + "\n" for one in CHATS).encode(),
            "JSON lines",
        ),
    ],
)
def test_the_same_rows_in_other_containers(tmp_path: Path, name: str, data: bytes, kind: str) -> None:
    """The bytes decide, not the name of the file."""
    (tmp_path / name).write_bytes(data)
    (source,), rows = read_datasets([tmp_path / name])
    assert source.kind == kind
    assert source.formats == (("chat", 3),)
    assert [row.messages[0].content for row in rows] == [one["messages"][0]["content"] for one in CHATS]


def test_parquet(tmp_path: Path) -> None:
    """Keys that a row lacks are null in parquet, and count as missing."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: install the quantize extra")
    from pyarrow import parquet  # noqa: PLC0415

    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    rows: list[object] = [{"messages": messages, "images": None}, {"messages": CHATS[0]["messages"], "images": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (source,), read = read_datasets([tmp_path / "a.parquet"])
    assert (source.kind, source.formats) == ("parquet", (("chat", 1), ("chat with tools", 1)))
    assert [row.where for row in read] == [f"{tmp_path / 'a.parquet'}: row {number}" for number in (1, 2)]
    assert read[0].messages[1].tool_calls[0].name == "f"
    assert read[1].messages[1].tool_calls == ()


def empty_directory(path: Path) -> None:
    """A directory without data."""
    path.mkdir()


def data_directory(path: Path) -> None:
    """A directory with data."""
    (path / "train").mkdir(parents=True)
    (path / "train" / "a.parquet").touch()


def written(data: bytes) -> Callable[[Path], object]:
    """A file with these bytes."""
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize(
    "name,write,problem",
    [
        ("f.csv", written(b"prompt,completion\na,b\n"), "is a table of csv, not JSON; write one JSON object a line"),
        ("f.txt", written(b"Once upon a time\n"), "is plain text, not JSON; write one JSON object a line"),
        ("f.jsonl", written(b""), "is empty"),
        ("f.jsonl", written(b" \n\n"), "is empty"),
        ("f.json", written(b"[]"), "holds no rows"),
        ("f.json", written(b'[{"messages": []'), "begins like a JSON array, and is none: Expecting ',' delimiter"),
        ("f.json", written('["ü"]'.encode("latin-1")), "not UTF-8: invalid start byte in line 1; save it as UTF-8"),
        ("f.jsonl", written(b"\xff\xfe{\0a"), "not utf-16: truncated data in line 1; save it as UTF-8"),
        ("f.jsonl.gz", written(gzip.compress(LINES.encode() * 90)[:-40]), "its compressed data is damaged: "),
        ("f.zip", written(b"PK\x03\x04...."), "is a zip archive; unpack it"),
        ("f.jsonl.zst", written(b"\x28\xb5\x2f\xfd...."), "is compressed by zstd; decompress it (zstd -d)"),
        ("f.arrow", written(b"ARROW1\0\0"), "is an Arrow file; save it as parquet"),
        ("f.parquet", written(b"PAR1...."), "damaged parquet: "),
        ("f", empty_directory, "is a directory, --data takes files; it holds no JSON or parquet"),
        ("f", data_directory, "is a directory, --data takes files; it holds train/a.parquet"),
        ("f", lambda _: None, "no such calibration file"),
    ],
)
def test_what_is_no_data_is_one_line(tmp_path: Path, name: str, write: Callable[[Path], object], problem: str) -> None:
    """With the name of the file and the reason."""
    if name == "f.parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow: install the quantize extra")
    write(tmp_path / name)
    with pytest.raises(CalibrationError) as caught:
        read_datasets([tmp_path / name])
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"{tmp_path / name}: {problem}")
    assert "\n" not in caught.value.problems[0]


def test_another_encoding_without_a_mark_is_one_line(tmp_path: Path) -> None:
    """Not one for every line of the file."""
    path = tmp_path / "f.jsonl"
    path.write_bytes("".join(f'{{"text": "für {number}"}}\n' for number in range(40)).encode("latin-1"))
    with pytest.raises(CalibrationError) as caught:
        read_datasets([path])
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}:1: not UTF-8: ")
    assert problem.endswith("(40 rows of this file); save it as UTF-8, e.g. by iconv -f latin1 -t utf-8")


def test_lines_are_read_one_after_the_other(tmp_path: Path) -> None:
    """A broken line is a problem of its own, wherever it stands."""
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"text": "a"}\n{oops\n\xff\n\n{"text": "b"}\n')
    kind, records = read_records(path)
    told = [(record.where, record.value, record.problem.partition(":")[0]) for record in records]
    assert kind == "JSON lines"
    assert told == [
        (f"{path}:1", {"text": "a"}, ""),
        (f"{path}:2", None, "not JSON"),
        (f"{path}:3", None, "not UTF-8"),
        (f"{path}:5", {"text": "b"}, ""),
    ]
