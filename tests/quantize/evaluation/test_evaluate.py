"""What an evaluation refuses before any model is loaded."""

from io import StringIO
from pathlib import Path

import pytest

from quantize.errors import CalibrationError, RecipeError
from quantize.evaluation.evaluate import EvaluationPlan, evaluate
from quantize.running.context import RunContext
from quantize.running.progress import ProgressReporter
from tests.quantize.chats import write_lines


def test_an_unknown_limit_is_refused_first(tmp_path: Path) -> None:
    """A misspelt limit costs no evaluation."""
    context = RunContext(tmp_path, {}, ProgressReporter(StringIO()))
    plan = EvaluationPlan(limits={"top1_agrement": 0.9})
    with pytest.raises(RecipeError, match="limit top1_agrement: there is no such limit; did you mean 'top1_agreement'"):
        evaluate(tmp_path, tmp_path, [], 4, context, plan=plan)


def test_broken_questions_are_refused_first(tmp_path: Path) -> None:
    """A broken line of questions costs no evaluation."""
    context = RunContext(tmp_path, {}, ProgressReporter(StringIO()))
    plan = EvaluationPlan(tasks=write_lines(tmp_path / "q.jsonl", ["{}"]))
    with pytest.raises(CalibrationError, match=r"q\.jsonl:1: "):
        evaluate(tmp_path, tmp_path, [], 4, context, plan=plan)
