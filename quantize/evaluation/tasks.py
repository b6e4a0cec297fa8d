"""Questions with known answers: read from JSONL, compared with what a model said, counted for parent and variant."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

from quantize.calibration.thinking import THINK, Markers
from quantize.errors import CalibrationError

_PROBLEMS_SHOWN = 10
_BOXED = "\\boxed{"
_GSM8K = "####"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_LATEX_FRACTION = re.compile(r"\\d?frac\{(-?\d+)\}\{(\d+)\}")
_FORM = '{"question": "...", "answer": "..."} or {"messages": [...], "answer": "..."}'


@dataclass(frozen=True, slots=True)
class TaskItem:
    """A chat that ends with a question, and the answer that counts."""

    messages: tuple[tuple[str, str], ...]
    answer: str

    def chat(self) -> list[dict[str, str]]:
        """The chat as a template wants it."""
        return [{"role": role, "content": content} for role, content in self.messages]


def question_from(payload: Mapping[str, Any]) -> TaskItem:
    """Read a question back from a job: what `asdict` made of it."""
    return TaskItem(tuple((role, content) for role, content in payload["messages"]), payload["answer"])


def read_questions(path: Path) -> tuple[TaskItem, ...]:
    """Read a JSONL file of questions; CalibrationError lists up to ten broken lines."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CalibrationError([f"{path}: can't be read: {error.strerror}; pass another file of questions"]) from None
    parsed = [parse_question(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    problems = list(islice((item for item in parsed if isinstance(item, str)), _PROBLEMS_SHOWN))
    if problems or not parsed:
        raise CalibrationError(problems or [f"{path}: has no questions; a line is {_FORM}"])
    return tuple(item for item in parsed if isinstance(item, TaskItem))


def parse_question(line: bytes, where: str) -> TaskItem | str:
    """Turn one line into a question, or into the problem it has."""
    try:
        value = json.loads(line)
    except ValueError as error:
        return f"{where}: not JSON: {error}"
    if not isinstance(value, dict) or ("question" in value) == ("messages" in value):
        return f"{where}: has neither or both of question and messages; a line is {_FORM}"
    answer = value.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        return f'{where}: "answer" is missing, empty or neither text nor number'
    messages = value.get("messages", [{"role": "user", "content": value.get("question")}])
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        return f"{where}: the question is empty, or a message lacks role or content"
    return TaskItem(tuple((message["role"], message["content"]) for message in messages), str(answer))


def dataset_digest(questions: Sequence[TaskItem]) -> str:
    """Digest questions and answers by content, in order."""
    return hashlib.sha256(json.dumps([asdict(question) for question in questions]).encode()).hexdigest()


def is_right(said: str, expected: str, markers: Markers = THINK) -> bool:
    """Tell whether a reply's answer is the expected one.

    Only what follows the reasoning counts: the last LaTeX box if there is one, else the last number where a number
    is expected, else the text at the reply's end, whatever its case and final marks.
    """
    wanted = _expected(expected)
    given = _conclusion(said, markers)
    boxed = _last_boxed(given)
    number = _as_number(wanted)
    if number is not None:
        found = _NUMBER.findall(_plain_fractions(boxed if boxed is not None else given))
        return bool(found) and _as_number(found[-1]) == number
    if boxed is not None:
        return _normal(boxed) == _normal(wanted)
    return re.search(rf"(?:^|\W){re.escape(_normal(wanted))}$", _normal(given)) is not None


def _conclusion(said: str, markers: Markers) -> str:
    if markers.end in said:
        return said.rpartition(markers.end)[2]
    return said.partition(markers.start)[0]


def _last_boxed(text: str) -> str | None:
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth, begin = 1, start + len(_BOXED)
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[begin:place]
    return None


def _expected(answer: str) -> str:
    boxed = _last_boxed(answer)
    return boxed if boxed is not None else answer.rpartition(_GSM8K)[2].strip()


def _plain_fractions(text: str) -> str:
    return _LATEX_FRACTION.sub(r"\1/\2", text)


def _as_number(text: str) -> Fraction | None:
    bare = _plain_fractions(text.strip().strip("$€£%").replace(",", "").removesuffix("."))
    try:
        return Fraction(bare)
    except (ValueError, ZeroDivisionError):
        return None


def _normal(text: str) -> str:
    bare = re.sub(r"[*_`$\"“”„]", "", text.casefold())
    return " ".join(bare.split()).rstrip(".!?:; ")


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        and bool(message["content"].strip())
    )
