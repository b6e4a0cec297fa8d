"""What an evaluation refuses before any model is loaded."""

from io import StringIO
from pathlib import Path

import pytest

from quantize.errors import CalibrationError, RecipeError
from quantize.measuring.measurement import EvaluationPlan, evaluate
from quantize.running.progress import Stages
from quantize.running.workshop import Workshop
from tests.quantize.chats import write_lines


def test_an_unknown_limit_is_refused_first(tmp_path: Path) -> None:
    """A misspelt limit costs no evaluation."""
    shop = Workshop(tmp_path, {}, Stages(StringIO()))
    plan = EvaluationPlan(limits={"top1_agrement": 0.9})
    with pytest.raises(RecipeError, match="limit top1_agrement: there is no such limit; did you mean 'top1_agreement'"):
        evaluate(tmp_path, tmp_path, [], 4, shop, plan=plan)


def test_broken_questions_are_refused_first(tmp_path: Path) -> None:
    """A broken line of questions costs no evaluation."""
    shop = Workshop(tmp_path, {}, Stages(StringIO()))
    plan = EvaluationPlan(tasks=write_lines(tmp_path / "q.jsonl", ["{}"]))
    with pytest.raises(CalibrationError, match=r"q\.jsonl:1: "):
        evaluate(tmp_path, tmp_path, [], 4, shop, plan=plan)
