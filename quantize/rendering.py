"""Chats -> token ids, once and by us: no double BOS, real truncation, reasoning kept. Runs as a child process."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from quantize.errors import CalibrationError, RecipeError
from quantize.worker import Report, run_child

_SPAN = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_PLAIN_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
_HEADLESS = re.compile(r"\A(?:(?!<think>).)*?</think>", re.DOTALL)


class Tokenizer(Protocol):
    """What we need of a transformers tokenizer.

    `apply_chat_template` renders text; calling it gives `input_ids` and, on request, `offset_mapping`: for each
    token the (start, end) of the characters it came from.
    """

    eos_token: str | None

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str: ...

    def __call__(self, text: str, **options: Any) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One chat as token ids; `reasoning_tokens` of them lie in think spans."""

    ids: tuple[int, ...]
    reasoning_tokens: int
    where: str
    sha256: str


def render(messages: Sequence[dict[str, str]], tokenizer: Tokenizer) -> str:
    """Render a chat as text, putting the last answer's reasoning back where the template deletes it."""
    chat = list(messages)
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    told = sum(message["content"].count("</think>") for message in chat)
    last = chat[-1]
    if text.count("</think>") >= told or last["role"] != "assistant" or "</think>" not in last["content"]:
        return text
    prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    return join_completion(prompt, last["content"]) + (tokenizer.eos_token or "")


def join_completion(prompt: str, completion: str) -> str:
    """Append a raw completion to a prompt that may already have opened the think span."""
    if prompt.rstrip().endswith("<think>") and completion.lstrip().startswith("<think>"):
        completion = completion.lstrip().removeprefix("<think>").lstrip("\n")
    return prompt + completion


def reasoning_spans(text: str) -> list[tuple[int, int]]:
    """Find the character ranges of reasoning; a prompt may have opened the first one, the last may be cut."""
    headless = _HEADLESS.match(text)
    start = headless.end() if headless else 0
    spans = [(0, start)] if headless else []
    return spans + [match.span() for match in _SPAN.finditer(text, start)]


def encode(row: dict[str, Any], tokenizer: Tokenizer, max_tokens: int) -> Sample:
    """Tokenize a chat, cut to `max_tokens` ids; special tokens come from the template alone."""
    text = render(row["messages"], tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"][:max_tokens], encoded["offset_mapping"][:max_tokens]
    spans = reasoning_spans(text)
    inside = sum(any(start <= first < end for start, end in spans) for first, _ in offsets)
    return Sample(tuple(ids), inside, row["where"], row["sha256"])


def require_reasoning(rows: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> None:
    """Refuse samples that lost all of their source's reasoning: the Hessian would never see it."""
    told = [row for row in rows if any("</think>" in message["content"] for message in row["messages"])]
    if told and not any(sample.reasoning_tokens for sample in samples):
        raise CalibrationError(
            [
                f"{told[0]['where']}: the chat template deletes all <think> reasoning; "
                "put it in the last assistant turn, or calibrate on text without reasoning",
            ],
        )


def load_tokenizer(base: Path) -> Any:
    """Load a base's own tokenizer; RecipeError where it can't render a chat."""
    import transformers  # noqa: PLC0415

    # For a plain tokenizer.json AutoTokenizer gives the same object, but imports torch on its way (10 s).
    plain = (base / "tokenizer.json").is_file() and _tokenizer_class(base) in _PLAIN_CLASSES
    loader = transformers.PreTrainedTokenizerFast if plain else transformers.AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{base}: its tokenizer can't be loaded: {str(error).splitlines()[0]}") from error
    if not tokenizer.chat_template:
        raise RecipeError(f"{base}: has no chat template; put its chat_template.jinja there")
    return tokenizer


def _tokenizer_class(base: Path) -> str:
    path = base / "tokenizer_config.json"
    return str(json.loads(path.read_bytes()).get("tokenizer_class", "")) if path.is_file() else ""


def tokenize_draw(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Child's work: `{base, max_tokens, rows: {side: [row]}}` -> `{side: [sample]}`."""
    tokenizer = load_tokenizer(Path(job["base"]))
    done, sides = 0, {}
    total = sum(map(len, job["rows"].values()))
    for side, rows in job["rows"].items():
        samples = []
        for row in rows:
            samples.append(encode(row, tokenizer, job["max_tokens"]))
            done += 1
            report.progress(done, total)
        require_reasoning(rows, samples)
        sides[side] = [asdict(sample) for sample in samples]
    return sides


if __name__ == "__main__":
    sys.exit(run_child(tokenize_draw))
