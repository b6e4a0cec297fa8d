"""How a run goes, as far as no recipe decides it: environment, reader, patience, what is measured at the end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from config.manifest import Engine
from quantize.evaluation.evaluate import DEFAULT_PLAN, EvaluationPlan
from quantize.running.progress import ProgressReporter


@dataclass(frozen=True, slots=True)
class RunOptions:
    """None of this changes a variant's weights.

    `environ` is that of the children; `allow_fallback` modules may be rounded to nearest, and with `expert_fallback`
    "rtn" experts that too few tokens reach; `resume` goes on after the last whole layer of a stopped run; `gpu` says
    where the work is done. `engine` and `tensor_parallel` are those that a search for a scheme must keep to.
    """

    environ: Mapping[str, str]
    progress: ProgressReporter
    evaluation: EvaluationPlan = DEFAULT_PLAN
    allow_fallback: int = 0
    expert_fallback: Literal["rtn", "fail"] = "rtn"
    resume: bool = False
    gpu: bool = False
    engine: Engine = "cpu"
    tensor_parallel: int = 1
