"""Text becomes token ids once: exactly one BOS where there is one, a real cut, and reasoning that is counted."""

import json
import os
import re
from dataclasses import asdict
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.calibration.datasets import CalibrationSplit
from quantize.calibration.parsing import parse_line
from quantize.calibration.records import Record
from quantize.calibration.samples import Samples, tokenize_samples
from quantize.calibration.tokenizing import adds_bos, encode, longest_input, require_reasoning, tokenize_split
from quantize.errors import CalibrationError, RecipeError
from quantize.running.context import RunContext
from quantize.running.progress import ProgressReporter
from quantize.running.worker import WorkerChannel, child_environ
from tests.quantize.templates import CHAT, PLAIN, QWQ


class Characters:
    """A tokenizer with a token a character; like Llama's, it adds a BOS (id 1) unless told not to."""

    eos_token: str | None = "<|end|>"
    bos_token_id: int | None = 1

    def __init__(self, template: str) -> None:
        self._template = jinja2.Template(template)

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str:
        """Render a chat."""
        assert options.pop("tokenize") is False
        return str(self._template.render(messages=conversation, **options))

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        """Encode a text."""
        first = [1] if options.get("add_special_tokens", True) else []
        offsets = [(0, 0)] * len(first) + [(place, place + 1) for place in range(len(text))]
        return {"input_ids": first + [ord(character) for character in text], "offset_mapping": offsets}


def row(where: str = "f:1", **line: Any) -> Record:
    """The row of a line."""
    read = parse_line(json.dumps(line), where)
    assert isinstance(read, Record)
    return read


def text_of(ids: tuple[int, ...]) -> str:
    """Decode a sample."""
    return "".join(map(chr, ids))


@given(st.integers(min_value=1, max_value=300))
def test_the_cut_is_by_tokens(max_tokens: int) -> None:
    """No sample is longer than `max_tokens`, a longer chat fills them, and what is missing is counted."""
    whole = encode(row(messages=CHAT), Characters(PLAIN), 10_000)
    sample = encode(row(messages=CHAT), Characters(PLAIN), max_tokens)
    assert sample.ids == whole.ids[:max_tokens]
    assert len(sample.ids) + sample.cut_tokens == len(whole.ids)


@given(st.integers(min_value=1, max_value=120))
def test_a_cut_sample_counts_the_reasoning_that_it_has(max_tokens: int) -> None:
    """Also where the cut took the closing tag."""
    sample = encode(row(messages=CHAT), Characters(QWQ), max_tokens)
    text = text_of(sample.ids)
    started = text.find("<think>")
    ended = text.find("</think>") + len("</think>") if "</think>" in text else len(text)
    whole = encode(row(messages=CHAT), Characters(QWQ), 10_000)
    expected = [place for first, last in whole.reasoning for place in range(first, last) if place < max_tokens]
    assert sample.reasoning_tokens == len(expected)
    if started >= 0:
        assert sample.reasoning == ((started, ended),)


@pytest.mark.parametrize("template", [PLAIN, QWQ])
def test_tokens_of_reasoning_and_answer_are_ranges(template: str) -> None:
    """The ranges cover the span with its tags, and all that follows it."""
    sample = encode(row(messages=CHAT), Characters(template), 1000)
    assert [text_of(sample.ids[first:last]) for first, last in sample.reasoning] == ["<think>\none and one\n</think>"]
    assert sample.reasoning_tokens == len("<think>\none and one\n</think>")
    assert text_of(sample.ids[slice(*sample.answer)]).strip().startswith("2<|")
    assert sample.answer[1] == len(sample.ids)


@pytest.mark.parametrize(
    "line,first",
    [
        ({"messages": CHAT}, [ord("<")]),
        ({"text": "abc"}, [1, ord("a")]),
        ({"text": "\x01abc"}, [1, ord("a")]),
        ({"prompt": "a", "completion": "b"}, [ord("<")]),
    ],
)
def test_special_tokens_come_from_the_template_and_for_bare_text_from_the_tokenizer(
    line: dict[str, Any], first: list[int]
) -> None:
    """A text that has its BOS gets no second one; a template that writes none gets none."""
    ids = encode(row(**line), Characters(PLAIN), 1000).ids
    assert list(ids[: len(first)]) == first


def test_reasoning_that_is_lost_everywhere_is_refused() -> None:
    """Where no sample keeps a reasoning token, calibration would never see any: that is an error with a line."""
    rows = [row(messages=[*CHAT, {"role": "user", "content": "thanks"}])]
    samples = [encode(rows[0], Characters(QWQ), max_tokens=1000)]
    with pytest.raises(CalibrationError, match="f:1: the chat template deletes all <think> reasoning"):
        require_reasoning(rows, samples)


def test_reasoning_that_is_cut_off_is_not_blamed_on_the_template() -> None:
    """A long system prompt leaves no room for it: the error names the limit, the row and the token."""
    long = {"role": "system", "content": "Rule. " * 500}
    rows = [row("f:1", messages=[long, *CHAT]), row("f:2", messages=[*CHAT, *CHAT[:0], *CHAT])]
    samples = [encode(one, Characters(QWQ), max_tokens=30) for one in rows[:1]]
    with pytest.raises(
        CalibrationError, match=r"f:1: --max-tokens cuts every sample before its reasoning; .* token 3\d\d\d;"
    ):
        require_reasoning(rows[:1], samples)
    require_reasoning(rows, [*samples, encode(rows[1], Characters(QWQ), max_tokens=1000)])


def test_text_without_reasoning_needs_none() -> None:
    """Ordinary chats are fine as they are."""
    rows = [row(messages=[{"role": "user", "content": "hello"}])]
    require_reasoning(rows, [encode(rows[0], Characters(PLAIN), max_tokens=10)])


@pytest.mark.parametrize(
    "config,limit",
    [({"max_position_embeddings": 512}, 512), ({"text_config": {"max_position_embeddings": 8}}, 8), ({}, None)],
)
def test_the_positions_of_a_model(config: dict[str, Any], limit: int | None) -> None:
    """Models of several parts tell it for their text part."""
    assert longest_input(config) == limit


# From here on with a real tokenizer.


def write_base(folder: Path, template: str | None, *, adds_bos: bool) -> Path:
    """A base as far as the tokenizer needs it: byte tokens, <s> as BOS, which its post-processor may add."""
    pytest.importorskip("transformers", reason="needs transformers: install the quantize extra")
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors  # noqa: PLC0415

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
        )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def tokenized(base: Path, rows: list[Record], max_tokens: int = 2048) -> list[dict[str, Any]]:
    """Samples of rows, by the child's work in this process."""
    job = {"base": str(base), "max_tokens": max_tokens, "rows": {"side": [asdict(row) for row in rows]}}
    samples: list[dict[str, Any]] = tokenize_split(job, WorkerChannel(TextIOWrapper(BytesIO())))["sides"]["side"]
    return samples


def calibrated(base: Path, rows: list[Record], tmp_path: Path, max_tokens: int) -> tuple[Samples, str]:
    """Samples of rows, by a child process, and what was said meanwhile."""
    with (tmp_path / "said").open("w") as stream:
        context = RunContext(tmp_path, child_environ(os.environ), ProgressReporter(stream))
        samples = tokenize_samples(base, CalibrationSplit(tuple(rows), ()), max_tokens, context)
    return samples, (tmp_path / "said").read_text()


BOS_FIRST = "{{ bos_token }}" + PLAIN


@pytest.mark.parametrize(
    "template,adds_bos,of_chat,of_text",
    [(BOS_FIRST, True, 1, 1), (BOS_FIRST, False, 1, 0), (PLAIN, True, 0, 1), (PLAIN, False, 0, 0)],
)
def test_a_double_bos_can_not_happen(tmp_path: Path, template: str, adds_bos: bool, of_chat: int, of_text: int) -> None:
    """Template and tokenizer may both write a BOS: a sample has one at most, at its front, and none is invented.

    That includes prompts with completions, and texts that bring their own.
    """
    base = write_base(tmp_path / "base", template, adds_bos=adds_bos)
    rows = [
        row(messages=CHAT),
        row(prompt="a", completion="b"),
        row(text="plain"),
        row(text="<s>with its own"),
    ]
    heads = [(sample["ids"].count(256), sample["ids"][0] == 256) for sample in tokenized(base, rows)]
    assert heads == [(of_chat, of_chat == 1)] * 2 + [(of_text, of_text == 1), (1, True)]


def test_a_line_of_twenty_thousand_tokens_is_cut_and_told(tmp_path: Path) -> None:
    """Cut to the limit, in one line that names the longest."""
    base = write_base(tmp_path / "base", PLAIN, adds_bos=False)
    rows = [row(messages=CHAT), row("f:2", text="x" * 20_000), row("f:3", text="y" * 3000)]
    samples, said = calibrated(base, rows, tmp_path, max_tokens=2048)
    assert [len(sample["ids"]) for sample in samples.calibration[1:]] == [2048, 2048]
    assert {sample["language"] for sample in samples.calibration} == {"latin"}
    assert "2 of 3 samples were cut to 2048 tokens; f:2 has 20000\n" in said


def test_no_sample_is_longer_than_the_models_positions(tmp_path: Path) -> None:
    """Whatever limit was asked for."""
    base = write_base(tmp_path / "base", PLAIN, adds_bos=False)
    (sample,) = tokenized(base, [row(text="x" * 5000)], max_tokens=1_000_000)
    assert (len(sample["ids"]), sample["cut_tokens"]) == (4096, 904)


def test_a_token_without_a_row_in_the_embeddings_is_refused(tmp_path: Path) -> None:
    """A tokenizer with added tokens over embeddings that were not resized: told before anything is computed."""
    base = write_base(tmp_path / "base", PLAIN, adds_bos=False)
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 80}))
    with pytest.raises(RecipeError, match=r"gives token id 87, and the embeddings have 80 rows \(f:2\); resize them"):
        tokenized(base, [row(text="aaa"), row("f:2", text="xxx")])


def test_a_tokenizer_larger_than_the_embeddings_is_told(tmp_path: Path) -> None:
    """Where no text uses the tokens beyond, that is a warning."""
    base = write_base(tmp_path / "base", PLAIN, adds_bos=False)
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 80}))
    _, said = calibrated(base, [row(text="aaa")], tmp_path, max_tokens=64)
    assert re.search(r"warning: the tokenizer has \d+ tokens and the embeddings 80 rows; requests with", said)


def test_bare_text_needs_no_template_but_chats_do(tmp_path: Path) -> None:
    """A base model without chats can be calibrated on text."""
    base = write_base(tmp_path / "base", None, adds_bos=True)
    (sample,) = tokenized(base, [row(text="plain <think>words</think>")])
    assert sample["reasoning_tokens"] == len("<think>words</think>")
    with pytest.raises(RecipeError, match="has no chat template"):
        tokenized(base, [row(messages=CHAT)])


@pytest.mark.parametrize(
    "spoil,problem", [("", "has no tokenizer"), ("{% for m in", "its chat template is invalid: line 1")]
)
def test_a_base_without_a_tokenizer_or_a_valid_template_is_refused(tmp_path: Path, spoil: str, problem: str) -> None:
    """In one line about the base, not about every chat."""
    base = write_base(tmp_path / "base", spoil or PLAIN, adds_bos=False)
    if not spoil:
        (base / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match=problem):
        tokenized(base, [row(messages=CHAT)])


def test_a_template_for_content_parts_gets_parts(tmp_path: Path) -> None:
    """Some templates drop contents that are plain text, and vLLM gives those parts; so do calibration samples."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %};{% endfor %}"
    )
    plain_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    parts, plain = (
        tokenized(write_base(tmp_path / name, text, adds_bos=False), [row(messages=CHAT)])[0]["ids"]
        for name, text in (
            ("parts", template),
            ("plain", plain_template),
        )
    )
    assert parts == plain


def test_a_chat_that_the_template_refuses_is_named_by_line(tmp_path: Path) -> None:
    """Templates insist on the order of roles, for one; every line that breaks it is told."""
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + PLAIN
    base = write_base(tmp_path / "base", template, adds_bos=False)
    wrong = [{"role": "assistant", "content": "hi"}]
    rows = [row("f:1", messages=wrong), row("f:2", messages=CHAT), row("f:3", messages=wrong)]
    with pytest.raises(CalibrationError) as caught:
        tokenized(base, rows)
    assert caught.value.problems == [
        f"f:{line}: the base's chat template refuses this chat: roles must alternate" for line in (1, 3)
    ]


def test_a_few_chats_that_the_template_refuses_are_skipped(tmp_path: Path) -> None:
    """Up to the share that may be invalid, and said with the first of them."""
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + PLAIN
    base = write_base(tmp_path / "base", template, adds_bos=False)
    wrong = row("f:7", messages=[{"role": "assistant", "content": "hi"}])
    good = [row(f"g:{number}", text=f"text {number}") for number in range(99)]
    samples, said = calibrated(base, [good[0], wrong, *good[1:]], tmp_path, max_tokens=64)
    assert [sample["where"] for sample in samples.calibration] == [record.where for record in good]
    assert samples.refused_rows == 1
    assert "invalid rows skipped: 1: f:7: the base's chat template refuses this chat" in said
    with pytest.raises(CalibrationError, match="f:7: the base's chat template refuses this chat"):
        calibrated(base, [wrong, *good[:50]], tmp_path, max_tokens=64)


def test_a_template_that_strips_reasoning_is_overruled_in_the_child_too(tmp_path: Path) -> None:
    """The samples carry the reasoning, its count and its place; a generated row is marked."""
    base = write_base(tmp_path / "base", QWQ, adds_bos=False)
    mark = {"from": "a" * 64, "finished": True}
    rows = [row(messages=CHAT), row(prompt="1+1?", completion="two</think>2", self_generated=mark)]
    samples = tokenized(base, rows)
    assert [sample["reasoning_tokens"] for sample in samples] == [28, 19]
    assert [sample["generated"] for sample in samples] == [False, True]


def test_a_tokenizer_without_a_bos_adds_none() -> None:
    """Nothing to add, nothing to find."""
    silent = Characters(PLAIN)
    silent.bos_token_id = None
    assert not adds_bos(silent)
    assert adds_bos(Characters(PLAIN))
