"""Questions with answers: what a line may look like, what counts as right, what is counted."""

import json
import math
from pathlib import Path

import pytest

from config.measurements import TaskMetrics
from quantize.calibration.thinking import HARMONY, MARKERS, joined
from quantize.errors import CalibrationError
from quantize.evaluation.figures import task_figures, tasks_of
from quantize.evaluation.tasks import TaskItem, dataset_digest, is_right, read_questions
from tests.quantize.chats import write_lines


def test_questions_are_read_in_both_forms(tmp_path: Path) -> None:
    """A question alone is a chat of one turn; answers may be numbers."""
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    lines = [json.dumps({"question": "2+2?", "answer": 4}), "", json.dumps({"messages": chat, "answer": "b"})]
    questions = read_questions(write_lines(tmp_path / "q.jsonl", lines))
    assert [question.answer for question in questions] == ["4", "b"]
    assert questions[0].chat() == [{"role": "user", "content": "2+2?"}]
    assert questions[1].chat() == chat


@pytest.mark.parametrize(
    "line,problem",
    [
        ("{", r"q.jsonl:2: not JSON"),
        ('["a"]', r"q.jsonl:2: has neither or both of question and messages"),
        ('{"answer": "1"}', r"q.jsonl:2: has neither or both of question and messages"),
        ('{"question": "a", "messages": [], "answer": "1"}', r"q.jsonl:2: has neither or both"),
        ('{"question": "a"}', r'q.jsonl:2: "answer" is missing'),
        ('{"question": "a", "answer": " "}', r'q.jsonl:2: "answer" is missing'),
        ('{"question": "a", "answer": true}', r'q.jsonl:2: "answer" is missing'),
        ('{"question": "", "answer": "1"}', r"q.jsonl:2: the question is empty"),
        ('{"messages": [{"role": "user"}], "answer": "1"}', r"q.jsonl:2: .* lacks role or content"),
    ],
)
def test_a_broken_line_is_told_by_file_and_line(tmp_path: Path, line: str, problem: str) -> None:
    """Every kind of broken line says where it is and what is wrong."""
    file = write_lines(tmp_path / "q.jsonl", ['{"question": "a", "answer": "1"}', line])
    with pytest.raises(CalibrationError, match=problem):
        read_questions(file)


@pytest.mark.parametrize("content", [None, ""])
def test_a_file_without_questions_is_refused(tmp_path: Path, content: str | None) -> None:
    """Neither a missing nor an empty file passes for no questions."""
    if content is not None:
        (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(CalibrationError, match=r"q\.jsonl: "):
        read_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    "said,expected,right",
    [
        ("It is 42.", "42", True),
        ("It is 42, not 41.", "42", False),
        ("<think>41?</think>It is **42**.", "42", True),
        ("<think>It is 42", "42", False),
        ("42</think>", "42", False),
        ("First 7. So \\boxed{42}. Check: 6 * 7.", "42", True),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("\\boxed{\\text{Paris}}", "\\text{Paris}", True),
        ("1,234 in all", "1234", True),
        ("$1,234.50", "1234.5", True),
        ("It costs €5", "€5", True),
        ("-3", "-3", True),
        ("3/4", "0.75", True),
        ("The steps are ... #### 18", "so 9 * 2 = 18\n#### 18", True),
        ("The answer is Paris.", "paris", True),
        ("Paris is the answer.", "paris", False),
        ("comparison", "son", False),
        ("(B)", "B", False),
        ("The answer is B", "B", True),
        ("\\boxed{b}", "B", True),
        ("", "42", False),
        ("no number", "42", False),
        ("\\boxed{42", "41", False),
    ],
)
def test_the_answer_counts_and_nothing_else(said: str, expected: str, right: bool) -> None:
    """Reasoning doesn't count; the last box, the last number or the text at the end does."""
    assert is_right(said, expected) is right


def test_the_reasoning_of_other_families_does_not_count() -> None:
    """Nor that of channels."""
    mistral, harmony = MARKERS[1], HARMONY
    assert is_right("[THINK]41[/THINK]42", "42", mistral)
    assert not is_right("[THINK]42", "42", mistral)
    assert is_right(joined("41", "It is 42", harmony), "42", harmony)
    assert not is_right("<|channel|>analysis<|message|>42", "42", harmony)


def test_recovery_and_flips_are_paired() -> None:
    """As many right answers as before can hide that others are right now."""
    answers = TaskMetrics(dataset_sha256="d", parent=(True, True, False, False), variant=(True, False, True, False))
    told = tasks_of(answers)
    assert (told.items, told.parent_accuracy, told.accuracy, told.recovery, told.flips) == (4, 0.5, 0.5, 1.0, 0.5)
    figures = task_figures(answers)
    assert (figures["recovery"].value, figures["flips"].value) == (1.0, 0.5)
    assert figures["recovery"].low < 0.5
    assert figures["recovery"].high > 1.5


def test_a_parent_without_right_answers_leaves_nothing_to_recover() -> None:
    """Recovery is then unknown, and nobody can be held against it."""
    answers = TaskMetrics(dataset_sha256="d", parent=(False,), variant=(True,))
    assert tasks_of(answers).recovery == 1.0
    assert task_figures(answers)["recovery"].low == -math.inf


def test_a_set_of_questions_is_named_by_its_contents() -> None:
    """Another answer is another data set."""
    one, other = TaskItem((("user", "a"),), "1"), TaskItem((("user", "a"),), "2")
    assert dataset_digest([one]) == dataset_digest([one]) != dataset_digest([other])
