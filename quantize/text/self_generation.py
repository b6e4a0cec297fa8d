"""Calibration text that the base writes itself: its own answers to the prompts of other calibration text.

The answers become a JSONL file in the cache, which is calibration text like any other. A prompt never changes sides:
what the base answers to a prompt of held-out text is held out as well, whatever the answer says. So no prompt of the
evaluation reaches calibration.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from config.load import home_directory
from quantize.base import BaseModel
from quantize.errors import CalibrationError
from quantize.running.worker import run_worker
from quantize.running.workshop import Workshop
from quantize.text.calibration import is_held_out, with_split_keys
from quantize.text.replica_answers import Answer, Question, Replica, Sampling
from quantize.text.rows import Message, Row, content_sha256, prompt_of

# Raise this when the same request would give other text because this package has changed.
_REVISION = 1
_SEEDS = 2**31


@dataclass(frozen=True, slots=True)
class Opening:
    """A prompt with the functions that it offers, and the row that decides on which side its answers lie."""

    messages: tuple[Message, ...]
    origin: str
    tools: str = ""


def self_generate(
    base: BaseModel,
    rows: Sequence[Row],
    count: int,
    *,
    sampling: Sampling,
    seed: int,
    url: str | None,
    shop: Workshop,
    held_out: int = 0,
) -> Path:
    """Let the base answer `count` prompts of `rows` for calibration and `held_out` for evaluation; give the file.

    A replica at `url` answers, or else the base itself in a child process. The same request finds its file again.
    """
    turns = chosen(rows, count, held_out, seed)
    asked = [Question(opening.messages, seed_of(opening, turn, seed), opening.tools) for opening, turn in turns]
    digest = _digest(base, asked, sampling, replica=url is not None)
    file = home_directory(shop.environ) / "self-generated" / f"{digest}.jsonl"
    if file.is_file():
        shop.stages.say(f"self-generate: reusing {file}")
        return file
    answers = _answers(base, asked, sampling, url, shop)
    lines = [line_of(opening, answer) for (opening, _), answer in zip(turns, answers, strict=True)]
    _write(file, [line for line in lines if line])
    return file


def chosen(rows: Sequence[Row], count: int, held_out: int, seed: int) -> list[tuple[Opening, int]]:
    """Choose prompts with the number of their turn; CalibrationError where there are none to calibrate on."""
    every = openings(rows)
    usable = [opening for opening in every if not _is_held_out(opening)]
    kept = [opening for opening in every if _is_held_out(opening)]
    if not usable:
        raise CalibrationError(["no prompts to answer: pass chats, or prompts with completions, with --data"])
    return [*_in_turns(usable, count, seed), *_in_turns(kept, held_out if kept else 0, seed)]


def openings(rows: Sequence[Row]) -> list[Opening]:
    """List the different prompts of rows, with the digest that decides on which side all rows with a prompt lie."""
    prompts: dict[tuple[tuple[Message, ...], str], str] = {}
    for row in with_split_keys(rows):
        prompt = prompt_of(row)
        if prompt and not row.generated:
            prompts.setdefault((prompt, row.tools), row.split_key)
    return [Opening(prompt, key, tools) for (prompt, tools), key in prompts.items()]


def seed_of(opening: Opening, turn: int, seed: int) -> int:
    """Give every answer a seed of its own, independent of the order of the files."""
    told = f"{seed}:{turn}:{content_sha256(opening.messages, opening.tools)}"
    return int(hashlib.sha256(told.encode()).hexdigest()[:8], 16) % _SEEDS


def line_of(opening: Opening, answer: Answer) -> str:
    """Write an answer as a line of calibration text that remembers its origin; an empty answer gives nothing."""
    if not answer.completion.strip():
        return ""
    told: dict[str, Any] = {
        "prompt": [turn.to_request() for turn in opening.messages],
        "completion": answer.completion,
        **({"tools": json.loads(opening.tools)} if opening.tools else {}),
        "self_generated": {"from": opening.origin, "finished": answer.finished},
    }
    return json.dumps(told, ensure_ascii=False)


def _in_turns(every: Sequence[Opening], count: int, seed: int) -> list[tuple[Opening, int]]:
    """Go through the prompts in the seed's order, again and again where there are fewer than wanted."""
    ordered = sorted(every, key=lambda opening: (seed_of(opening, 0, seed), opening.origin))
    return [(ordered[number % len(ordered)], number // len(ordered)) for number in range(count)]


def _is_held_out(opening: Opening) -> bool:
    return is_held_out(Row(opening.messages, "", "", origin=opening.origin))


def _answers(
    base: BaseModel, asked: Sequence[Question], sampling: Sampling, url: str | None, shop: Workshop
) -> list[Answer]:
    if url:
        with shop.stages.stage("self-generate", "answers") as advance:
            return Replica(url).answers(asked, sampling, advance)
    job = {
        "base": str(base.directory.resolve()),
        "questions": [asdict(question) for question in asked],
        "sampling": asdict(sampling),
    }
    with shop.stages.stage("self-generate", "steps") as advance:
        told = run_worker(
            "quantize.text.base_answers", job, folder=shop.folder, environ=shop.environ, on_progress=advance
        )
    return [Answer(**answer) for answer in told["answers"]]


def _digest(base: BaseModel, asked: Sequence[Question], sampling: Sampling, *, replica: bool) -> str:
    told = {
        "revision": _REVISION,
        "base": base.digest,
        "asked": list(map(_digested, asked)),
        "sampling": asdict(sampling),
        "replica": replica,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _digested(question: Question) -> dict[str, Any]:
    """Only what a prompt has, so that files of prompts without tools keep their names."""
    tools = {"tools": question.tools} if question.tools else {}
    return {"messages": [turn.to_request() for turn in question.messages], "seed": question.seed, **tools}


def _write(file: Path, lines: Sequence[str]) -> None:
    """Write a file that is there whole or not at all, also after a power cut."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in lines)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
