"""Calibration text that the base writes itself: its own answers to the prompts of other calibration text.

The answers become a JSONL file in the cache, which is calibration text like any other. A prompt never changes sides:
what the base answers to a prompt of held-out text is held out as well, whatever the answer says. So no prompt of the
evaluation reaches calibration.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantize.base import BaseModel
from quantize.calibration.datasets import is_held_out, with_split_keys
from quantize.calibration.records import Message, Record, content_sha256, prompt_of
from quantize.calibration.replica_client import Answer, Question, Replica, Sampling
from quantize.errors import CalibrationError
from quantize.running.context import RunContext
from quantize.running.stage_store import StageKey, stage_key
from quantize.running.worker import run_worker

# Raise this when the same request would give other text because this package has changed.
_REVISION = 1
_SEEDS = 2**31
ANSWERS_FILE = "answers.jsonl"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with the functions that it offers, and the row that decides on which side its answers lie."""

    messages: tuple[Message, ...]
    origin: str
    tools: str = ""


def self_generate(
    base: BaseModel,
    records: Sequence[Record],
    count: int,
    *,
    sampling: Sampling,
    seed: int,
    url: str | None,
    context: RunContext,
    held_out: int = 0,
) -> Path:
    """Let the base answer `count` prompts of `rows` for calibration and `held_out` for evaluation; give the file.

    A replica at `url` answers, or else the base itself in a child process. The same request finds its file again.
    """
    turns = chosen(records, count, held_out, seed)
    asked = [Question(prompt.messages, seed_of(prompt, turn, seed), prompt.tools) for prompt, turn in turns]
    key = _key(base, asked, sampling, replica=url is not None)
    found = context.stages.find(key)
    if found is not None:
        context.progress.log(f"self-generate: reusing {found.directory}")
        return found.directory / ANSWERS_FILE
    answers = _answers(base, asked, sampling, url, context)
    lines = [line_of(prompt, answer) for (prompt, _), answer in zip(turns, answers, strict=True)]
    with context.stages.staging(key) as staged:
        (staged / ANSWERS_FILE).write_text("".join(f"{line}\n" for line in lines if line), encoding="utf-8")
        return context.stages.keep(key, staged, {}, subject=base.name).directory / ANSWERS_FILE


def chosen(records: Sequence[Record], count: int, held_out: int, seed: int) -> list[tuple[Prompt, int]]:
    """Choose prompts with the number of their turn; CalibrationError where there are none to calibrate on."""
    every = prompts_of(records)
    usable = [prompt for prompt in every if not _is_held_out(prompt)]
    kept = [prompt for prompt in every if _is_held_out(prompt)]
    if not usable:
        raise CalibrationError(["no prompts to answer: pass chats, or prompts with completions, with --data"])
    return [*_round_robin(usable, count, seed), *_round_robin(kept, held_out if kept else 0, seed)]


def prompts_of(records: Sequence[Record]) -> list[Prompt]:
    """List the different prompts of rows, with the digest that decides on which side all rows with a prompt lie."""
    prompts: dict[tuple[tuple[Message, ...], str], str] = {}
    for record in with_split_keys(records):
        prompt = prompt_of(record)
        if prompt and not record.generated:
            prompts.setdefault((prompt, record.tools), record.split_key)
    return [Prompt(prompt, key, tools) for (prompt, tools), key in prompts.items()]


def seed_of(prompt: Prompt, turn: int, seed: int) -> int:
    """Give every answer a seed of its own, independent of the order of the files."""
    text = f"{seed}:{turn}:{content_sha256(prompt.messages, prompt.tools)}"
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % _SEEDS


def line_of(prompt: Prompt, answer: Answer) -> str:
    """Write an answer as a line of calibration text that remembers its origin; an empty answer gives nothing."""
    if not answer.completion.strip():
        return ""
    payload: dict[str, Any] = {
        "prompt": [turn.to_request() for turn in prompt.messages],
        "completion": answer.completion,
        **({"tools": json.loads(prompt.tools)} if prompt.tools else {}),
        "self_generated": {"from": prompt.origin, "finished": answer.finished},
    }
    return json.dumps(payload, ensure_ascii=False)


def _round_robin(every: Sequence[Prompt], count: int, seed: int) -> list[tuple[Prompt, int]]:
    """Go through the prompts in the seed's order, again and again where there are fewer than wanted."""
    ordered = sorted(every, key=lambda prompt: (seed_of(prompt, 0, seed), prompt.origin))
    return [(ordered[number % len(ordered)], number // len(ordered)) for number in range(count)]


def _is_held_out(prompt: Prompt) -> bool:
    return is_held_out(Record(prompt.messages, "", "", origin=prompt.origin))


def _answers(
    base: BaseModel, asked: Sequence[Question], sampling: Sampling, url: str | None, context: RunContext
) -> list[Answer]:
    if url:
        with context.progress.stage("self-generate", "answers") as advance:
            return Replica(url).answers(asked, sampling, advance)
    job = {
        "base": str(base.directory.resolve()),
        "questions": [asdict(question) for question in asked],
        "sampling": asdict(sampling),
    }
    with context.progress.stage("self-generate", "steps") as advance:
        result = run_worker(
            "quantize.calibration.generation_child",
            job,
            folder=context.folder,
            environ=context.environ,
            on_progress=advance,
        )
    return [Answer(**answer) for answer in result["answers"]]


def _key(base: BaseModel, asked: Sequence[Question], sampling: Sampling, *, replica: bool) -> StageKey:
    return stage_key(
        "answers",
        revision=_REVISION,
        base=base.digest,
        asked=list(map(_digested, asked)),
        sampling=asdict(sampling),
        replica=replica,
    )


def _digested(question: Question) -> dict[str, Any]:
    """Only what a prompt has."""
    tools = {"tools": question.tools} if question.tools else {}
    return {"messages": [turn.to_request() for turn in question.messages], "seed": question.seed, **tools}
