"""GGUF files become plain model directories, whole or not at all."""

import io
import os
from pathlib import Path

import pytest

from quantize.errors import RecipeError, TargetError
from quantize.gguf import unpack_gguf
from quantize.running.progress import ProgressReporter
from quantize.running.worker import child_environ


def unpack(file: Path, out: Path) -> None:
    """Unpack quietly."""
    unpack_gguf(file, out, environ=child_environ(os.environ), progress=ProgressReporter(io.StringIO()))


@pytest.mark.parametrize(
    "content,problem",
    [(None, "no such file"), (b"PK", "not a GGUF file"), (b"GGUF\x03", "not supported by transformers")],
)
def test_what_is_no_gguf_file_is_told(tmp_path: Path, content: bytes | None, problem: str) -> None:
    """Missing, foreign and damaged files are refused, and nothing is written."""
    if content == b"GGUF\x03":
        pytest.importorskip("torch", reason="needs torch: install the quantize extra")
    file = tmp_path / "in" / "a.gguf"
    file.parent.mkdir()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RecipeError, match=problem):
        unpack(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_directory_in_the_way_is_told(tmp_path: Path) -> None:
    """Nothing is written over."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(TargetError, match="exists and is not empty; choose another"):
        unpack(tmp_path / "a.gguf", tmp_path)
