"""A draw of calibration text -> token samples, by the base's own tokenizer and chat template."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantize.running.worker import run_worker
from quantize.running.workshop import Workshop
from quantize.text.calibration import Draw
from quantize.text.language import language_of, likeness
from quantize.text.rows import Row


@dataclass(frozen=True, slots=True)
class Samples:
    """Token samples as plain data: to calibrate on, and held out.

    Each has the fields of `quantize.text.tokenizing.Sample`, the `language` it is in, and `likeness`, which near
    duplicates share. `repeated_rows` of the `read_rows` in the files were left out, for others say the same;
    `refused_rows` were skipped, for the base's chat template refuses them.
    """

    calibration: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    read_rows: int = 0
    repeated_rows: int = 0
    refused_rows: int = 0


def calibrate(base: Path, drawn: Draw, max_tokens: int, shop: Workshop) -> Samples:
    """Tokenize both sides of a draw; says how many samples were cut, and which were skipped."""
    sides = {"calibration": drawn.calibration, "held_out": drawn.held_out}
    rows = {side: [asdict(row) for row in rows] for side, rows in sides.items()}
    job = {"base": str(base.resolve()), "max_tokens": max_tokens, "max_bad": drawn.max_bad, "rows": rows}
    with shop.stages.stage("calibrate", "chats") as advance:
        told = run_worker(
            "quantize.text.tokenizing", job, folder=shop.folder, environ=shop.environ, on_progress=advance
        )
    described = {
        side: [_described(sample, row) for sample, row in zip(told["sides"][side], rows, strict=True) if sample]
        for side, rows in sides.items()
    }
    cut = cut_line([sample for samples in described.values() for sample in samples], told["max_tokens"])
    if cut:
        shop.stages.say(cut)
    for line in told["notes"]:
        shop.stages.say(line)
    if told["refused"]:
        shop.stages.say(f"invalid rows skipped: {len(told['refused'])}: {told['refused'][0]}")
    return Samples(
        described["calibration"], described["held_out"], drawn.read_rows, drawn.repeated_rows, len(told["refused"])
    )


def cut_line(samples: Sequence[dict[str, Any]], max_tokens: int) -> str:
    """Say how many samples the limit cut, or nothing."""
    cut = [sample for sample in samples if sample["cut_tokens"]]
    if not cut:
        return ""
    longest = max(cut, key=lambda sample: int(sample["cut_tokens"]))
    tokens = len(longest["ids"]) + longest["cut_tokens"]
    return f"{len(cut)} of {len(samples)} samples were cut to {max_tokens} tokens; {longest['where']} has {tokens}"


def within(samples: Sequence[dict[str, Any]], most_tokens: int) -> list[dict[str, Any]]:
    """Take samples in order while they fit into `most_tokens`, at least one."""
    taken: list[dict[str, Any]] = []
    tokens = 0
    for sample in samples:
        tokens += len(sample["ids"])
        if taken and tokens > most_tokens:
            break
        taken.append(sample)
    return taken


def _described(sample: dict[str, Any], row: Row) -> dict[str, Any]:
    alike = hashlib.sha256(likeness(row.words).encode()).hexdigest()
    return {**sample, "language": language_of(row.words), "likeness": alike}
