"""A patch of vLLM: the defect it is for, how to detect the defect, and how to work around it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Patch:
    """One defect; `is_needed` detects it in this process, and `apply` changes vLLM or torch for good.

    `upstream` is the report or pull request that describes the defect. Remove the patch when the test of its defect in
    tests/serving/vllm_plugin fails: the tested vLLM no longer has it.
    """

    name: str
    upstream: str
    is_needed: Callable[[], bool]
    apply: Callable[[], None]
