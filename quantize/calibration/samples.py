"""A draw of calibration text -> token samples, by the base's own tokenizer and chat template."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantize.calibration.datasets import CalibrationSplit
from quantize.calibration.language import dedup_key, language_of
from quantize.calibration.records import Record
from quantize.running.context import RunContext
from quantize.running.worker import run_worker


@dataclass(frozen=True, slots=True)
class Samples:
    """Token samples as plain data: to calibrate on, and held out.

    Each has the fields of `quantize.calibration.tokenizing.Sample`, its `language`, and `dedup_key`, which near
    duplicates share. `repeated_rows` of the `read_rows` in the files were left out, for others say the same;
    `refused_rows` were skipped, for the base's chat template refuses them. `spare` samples could calibrate and don't.
    """

    calibration: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    read_rows: int = 0
    repeated_rows: int = 0
    refused_rows: int = 0
    spare: list[dict[str, Any]] = field(default_factory=list)


def tokenize_samples(base: Path, split: CalibrationSplit, max_tokens: int, context: RunContext) -> Samples:
    """Tokenize both sides of a draw; says how many samples were cut, and which were skipped."""
    sides = {"calibration": split.calibration, "held_out": split.held_out}
    if split.spare:
        sides["spare"] = split.spare
    records = {side: [asdict(record) for record in records] for side, records in sides.items()}
    job = {"base": str(base.resolve()), "max_tokens": max_tokens, "max_bad": split.max_bad, "rows": records}
    with context.progress.stage("tokens", "chats") as advance:
        result = run_worker(
            "quantize.calibration.tokenizing", job, folder=context.folder, environ=context.environ, on_progress=advance
        )
    described = {
        side: [
            _described(sample, record) for sample, record in zip(result["sides"][side], records, strict=True) if sample
        ]
        for side, records in sides.items()
    }
    cut = cut_line([sample for samples in described.values() for sample in samples], result["max_tokens"])
    if cut:
        context.progress.log(cut)
    for line in result["notes"]:
        context.progress.log(line)
    if result["refused"]:
        context.progress.log(f"invalid rows skipped: {len(result['refused'])}: {result['refused'][0]}")
    return Samples(
        described["calibration"],
        described["held_out"],
        split.read_rows,
        split.repeated_rows,
        len(result["refused"]),
        described.get("spare", []),
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


def _described(sample: dict[str, Any], record: Record) -> dict[str, Any]:
    alike = hashlib.sha256(dedup_key(record.words).encode()).hexdigest()
    return {**sample, "language": language_of(record.words), "dedup_key": alike}
