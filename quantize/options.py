"""Options of a run that do not change the weights: child environment, progress output, fallbacks, evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from config.manifest import Engine
from quantize.evaluation.evaluate import DEFAULT_PLAN, EvaluationPlan
from quantize.running.progress import ProgressReporter
from quantize.running.stage_store import DEFAULT_KEEP_BYTES


@dataclass(frozen=True, slots=True)
class RunOptions:
    """None of this changes a variant's weights.

    `environ` is that of the children; `allow_fallback` modules may be rounded to nearest, and with `expert_fallback`
    "rtn" experts that too few tokens reach. `resume` uses the results of stages that earlier runs kept; `keep_bytes`
    of them stay at the end. `gpu` says where the work is done. `engine` and `tensor_parallel` are those that a search
    for a scheme must keep to.
    """

    environ: Mapping[str, str]
    progress: ProgressReporter
    evaluation: EvaluationPlan = DEFAULT_PLAN
    allow_fallback: int = 0
    expert_fallback: Literal["rtn", "fail"] = "rtn"
    resume: bool = True
    keep_bytes: int = DEFAULT_KEEP_BYTES
    gpu: bool = False
    engine: Engine = "cpu"
    tensor_parallel: int = 1
