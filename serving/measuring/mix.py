"""Lengths of requests: shapes by share, evenly interleaved, each length varied a little; pure.

Every level and every variant gets the same lengths in the same order, so that figures are comparable. The tokens of a
prompt are random each time: a prompt that was sent before would be answered from the prefix cache.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from config.capacity import Hardware, Shape

LENGTHS_SEED = 4711
SPREAD = 0.2
DEFAULT_MIX = ((256, 256, 0.5), (1024, 128, 0.25), (128, 1024, 0.25))
# A CPU is some ten times slower than a GPU: shorter requests, so that a level takes no longer.
CPU_DIVISOR = 8


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and answer of one request, in tokens."""

    prompt_tokens: int
    answer_tokens: int


def parse_mix(text: str) -> tuple[Shape, ...]:
    """Parse `PROMPT:ANSWER:SHARE,...`; shares are relative. ValueError for a shape that is not valid."""
    rows = [_row(part) for part in text.split(",")]
    total = sum(share for _, _, share in rows)
    return tuple(
        Shape(prompt_tokens=prompt, answer_tokens=answer, share=share / total) for prompt, answer, share in rows
    )


def _row(part: str) -> tuple[int, int, float]:
    words = part.split(":")
    try:
        prompt, answer, share = int(words[0]), int(words[1]), float(words[2]) if words[2:] else 1.0
        fits = len(words) <= 3 and prompt > 0 and answer > 0 and 0 < share < float("inf")
    except (ValueError, IndexError):
        fits = False
    if not fits:
        raise ValueError(
            f"{part!r} is not a shape; write PROMPT:ANSWER:SHARE with positive numbers, such as 512:128:0.5"
        )
    return prompt, answer, share


def default_mix(hardware: Hardware, max_model_len_tokens: int | None) -> tuple[Shape, ...]:
    """Question and answer, long prompt, long answer: an eighth as long on CPU, and at most half of the context."""
    scale = 1 / CPU_DIVISOR if hardware.unit == "core" else 1.0
    if max_model_len_tokens is not None:
        longest = max(prompt + answer for prompt, answer, _ in DEFAULT_MIX)
        scale = min(scale, max_model_len_tokens / 2 / longest)
    return tuple(
        Shape(prompt_tokens=max(1, round(prompt * scale)), answer_tokens=max(1, round(answer * scale)), share=share)
        for prompt, answer, share in DEFAULT_MIX
    )


def too_long(mix: Sequence[Shape], max_model_len_tokens: int | None) -> str | None:
    """Return the first shape that does not fit into the context, or None if all do."""
    for shape in mix:
        tokens = shape.prompt_tokens + shape.answer_tokens
        if max_model_len_tokens is not None and tokens > max_model_len_tokens:
            return f"{shape.prompt_tokens}:{shape.answer_tokens} needs {tokens} tokens of {max_model_len_tokens}"
    return None


def request_lengths(mix: Sequence[Shape], max_model_len_tokens: int | None) -> Iterator[Lengths]:
    """Yield requests for ever; after each of them, every shape has had its share as nearly as possible."""
    # Not for secrets: the same lengths every time are the point.
    spread = random.Random(LENGTHS_SEED)  # noqa: S311
    sent = [0] * len(mix)
    while True:
        number = sum(sent) + 1
        chosen = max(range(len(mix)), key=lambda index: mix[index].share * number - sent[index])
        sent[chosen] += 1
        yield _around(mix[chosen], spread, max_model_len_tokens)


def _around(shape: Shape, spread: random.Random, max_model_len_tokens: int | None) -> Lengths:
    prompt, answer = (
        max(1, round(tokens * spread.uniform(1 - SPREAD, 1 + SPREAD)))
        for tokens in (shape.prompt_tokens, shape.answer_tokens)
    )
    if max_model_len_tokens is not None and prompt + answer > max_model_len_tokens:
        return Lengths(shape.prompt_tokens, shape.answer_tokens)
    return Lengths(prompt, answer)


def unique_prompt(tokens: int, vocabulary: int, chance: random.Random) -> list[int]:
    """Draw a prompt as token ids, not from both ends of the vocabulary, where special tokens are."""
    return chance.choices(range(vocabulary // 4, vocabulary - vocabulary // 16), k=tokens)
