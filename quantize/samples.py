"""A draw of calibration text -> token samples, by the base's own tokenizer and chat template."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantize.calibration import Draw, Row
from quantize.worker import run_worker
from quantize.workshop import Workshop


@dataclass(frozen=True, slots=True)
class Samples:
    """Token samples as plain data: to calibrate on, and held out.

    Each is `{"ids": [token id], "reasoning_tokens": int, "where": "file:line", "sha256": of its content}`.
    """

    calibration: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def calibrate(base: Path, drawn: Draw, max_tokens: int, shop: Workshop) -> Samples:
    """Tokenize both sides of a draw."""
    rows = {
        "calibration": [_plain(row) for row in drawn.calibration],
        "held_out": [_plain(row) for row in drawn.held_out],
    }
    job = {"base": str(base.resolve()), "max_tokens": max_tokens, "rows": rows}
    with shop.stages.stage("calibrate", "chats") as advance:
        told = run_worker("quantize.rendering", job, folder=shop.folder, environ=shop.environ, on_progress=advance)
    return Samples(told["calibration"], told["held_out"])


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


def _plain(row: Row) -> dict[str, Any]:
    return {"messages": [asdict(message) for message in row.messages], "where": row.where, "sha256": row.sha256}
