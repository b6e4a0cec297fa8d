"""Special tokens that a content names stay text, in tokenizers of both kinds; nothing else changes."""

import json
from pathlib import Path
from typing import Any

import pytest

from quantize.calibration.literals import Literals
from quantize.calibration.parsing import parse_line
from quantize.calibration.records import Record
from quantize.calibration.tokenizing import Sample, encode, load_tokenizer
from tests.quantize.models import CHATML
from tests.quantize.templates import QWQ

SPECIAL = ["<|im_start|>", "<|im_end|>", "[THINK]", "[/THINK]"]
NAMED = "What does <|im_end|> mean? And <|im_start|> system?"


def row_of(**line: Any) -> Record:
    """The row of a line."""
    row = parse_line(json.dumps(line), "f:1")
    assert isinstance(row, Record)
    return row


def chat(question: str, answer: str) -> Record:
    """A chat of two turns."""
    return row_of(messages=[{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def byte_level(tokenizers: Any) -> Any:
    """A BPE over bytes, like Qwen's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def sentence_piece(tokenizers: Any) -> Any:
    """A BPE with a mark for spaces, one before the first word, like Llama 2's and Mistral's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    return tokenizer


@pytest.fixture(params=[byte_level, sentence_piece])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A trained tokenizer with a ChatML template, loaded as a base's is."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: install the quantize extra")
    built = request.param(tokenizers)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", *SPECIAL],
        initial_alphabet=[*tokenizers.pre_tokenizers.ByteLevel.alphabet(), *"▁<>|[]/?_\n"],
        show_progress=False,
    )
    built.train_from_iterator([NAMED, "the im_end and the im_start of a system"] * 20, trainer)
    built.save(str(tmp_path / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    return load_tokenizer(tmp_path)


def encoded(row: Record, tokenizer: Any) -> Sample:
    """The whole row as a sample."""
    return encode(row, tokenizer, 10_000, Literals.of(tokenizer))


def test_a_named_token_is_text(tokenizer: Any) -> None:
    """The template's tokens are special, those in contents are not, and the text reads the same."""
    sample = encoded(chat(NAMED, "It ends a turn: <|im_end|>"), tokenizer)
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in SPECIAL[:2])
    assert (sample.ids.count(start), sample.ids.count(end)) == (2, 2)
    text = tokenizer.decode(sample.ids).replace(" ", "")
    assert text == (
        f"<|im_start|>user\n{NAMED}<|im_end|>\n<|im_start|>assistant\nIt ends a turn: <|im_end|><|im_end|>\n"
    ).replace(" ", "")


def test_contents_are_encoded_as_without_special_tokens(tokenizer: Any) -> None:
    """Between the template's tokens, the ids are those of a tokenizer that knows no special tokens."""
    sample = encoded(chat(NAMED, "yes"), tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    first = sample.ids[1 : sample.ids.index(end)]
    plain = tokenizer("x<|im_start|>user\n" + NAMED, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    alone = tokenizer("x<|im_start|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(first) == tokenizer.decode(plain[len(alone) :])
    assert end not in plain


@pytest.mark.parametrize("answer", ["plain", "<think>\nhm\n</think>\n\nyes", "[THINK]hm[/THINK]yes"])
def test_other_rows_are_encoded_as_ever(tokenizer: Any, answer: str) -> None:
    """Where no content names a special token, and where an answer marks its reasoning by one."""
    row = chat("And you?", answer)
    literals = Literals.of(tokenizer)
    assert encode(row, tokenizer, 10_000, literals) == encode(row, tokenizer, 10_000)
    if "[THINK]" not in answer:
        assert literals.masked(row) is row


def test_bare_text_and_completions_bring_their_own_tokens(tokenizer: Any) -> None:
    """Text that was rendered before, and what a model wrote itself, hold special tokens on purpose."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded(row_of(text="<|im_start|>user\nhi<|im_end|>"), tokenizer).ids.count(end) == 1
    assert encoded(row_of(prompt="hi", completion="a<|im_end|>b"), tokenizer).ids.count(end) == 3


def test_reasoning_is_found_beside_named_tokens(tokenizer: Any) -> None:
    """Positions are those of the text as it was rendered."""
    tokenizer.chat_template = QWQ
    sample = encoded(chat(NAMED, "<think>\nIt is <|im_end|>.\n</think>\n\nyes"), tokenizer)
    ((first, last),) = sample.reasoning
    assert tokenizer.decode(sample.ids[first:last]).replace(" ", "") == "<think>\nItis<|im_end|>.\n</think>"
    assert tokenizer.decode(sample.ids[slice(*sample.answer)]).strip() == "yes<|im_end|>"
    assert sample.ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


def test_arguments_of_tools_are_text(tokenizer: Any) -> None:
    """Also in what a template writes as JSON."""
    tokenizer.chat_template = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    )
    call = {"function": {"name": "f", "arguments": {"stop": "<|im_end|>"}}}
    row = row_of(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}])
    sample = encoded(row, tokenizer)
    assert sample.ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert '"stop": "<|im_end|>"'.replace(" ", "") in tokenizer.decode(sample.ids).replace(" ", "")
