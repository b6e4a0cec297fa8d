"""Calibration text for tests: chats that reason, as many as wanted, all different."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def chat(number: int) -> dict[str, Any]:
    """One chat with a question, reasoning and an answer; numbers make contents differ."""
    return {
        "messages": [
            {"role": "user", "content": f"What is {number} plus {number + 1}?"},
            {
                "role": "assistant",
                "content": f"<think>\nI add {number} and {number + 1}.\n</think>\nIt is {2 * number + 1}.",
            },
        ],
    }


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    """Write lines as a file."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_chats(path: Path, count: int) -> Path:
    """Write `count` different chats as JSONL."""
    return write_lines(path, (json.dumps(chat(number)) for number in range(count)))
