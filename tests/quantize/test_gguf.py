"""GGUF files become plain model directories, whole or not at all."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from quantize.errors import RecipeError, TargetError
from quantize.gguf import unpack_gguf
from quantize.gguf_tokenizer import TextEnds, text_ends
from quantize.running.progress import ProgressReporter
from quantize.running.worker import child_environ
from tests.quantize.gguf_files import write_gguf


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


@pytest.mark.parametrize(
    "fields,bos,eos",
    [
        ({"model": "llama", "add_bos_token": True, "add_eos_token": False}, True, False),
        ({"model": "llama", "add_bos_token": False}, False, False),
        ({"model": "llama"}, True, False),
        ({"model": "gpt2", "pre": "smollm"}, False, False),
        ({"model": "gpt2", "pre": "llama-bpe"}, True, False),
        ({"model": "gpt2", "pre": "llama-bpe", "add_bos_token": False}, False, False),
        ({"model": "gpt2", "pre": "qwen2", "add_bos_token": True, "add_eos_token": True}, True, True),
        ({"model": "t5"}, False, True),
        ({}, False, False),
    ],
)
def test_ends_are_those_of_llama_cpp(fields: dict[str, Any], bos: bool, eos: bool) -> None:
    """The file's flags win; without them the kind of vocabulary decides."""
    assert text_ends(fields) == TextEnds(bos, eos)


_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.real_model
@pytest.mark.parametrize(
    "model,flags,text,twice",
    [
        ("llama", {}, "<s>a", "<s>b"),
        ("llama", {"add_bos_token": False, "add_eos_token": True}, "a</s>", "b</s>"),
        ("gpt2", {"add_bos_token": True, "add_eos_token": True}, "<s>a</s>", "<s>b</s>"),
    ],
)
def test_a_tokenizer_adds_the_ends_that_its_file_names(
    tmp_path: Path, model: str, flags: dict[str, bool], text: str, twice: str
) -> None:
    """Each once, of whatever family; a chat template that writes its BOS itself stays as it is."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: install the quantize extra")
    pytest.importorskip("torch", reason="needs torch: install the quantize extra")
    out = tmp_path / "out"
    unpack(write_gguf(tmp_path / "in" / "a.gguf", model, flags, _TEMPLATE), out)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    assert _joined(tokenizer, tokenizer("a")) == text
    assert _joined(tokenizer, tokenizer("a", "b")) == text + twice
    assert _joined(tokenizer, tokenizer("a", add_special_tokens=False)) == "a"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<s>a"
    told = json.loads((out / "tokenizer_config.json").read_bytes())
    assert (told.get("add_bos_token", False), told.get("add_eos_token", False)) == ("<s>" in text, "</s>" in text)


def _joined(tokenizer: Any, encoded: Any) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(encoded["input_ids"])).replace("▁", "")
