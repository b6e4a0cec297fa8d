"""What a user asks for, every default filled in: the command line and the recipe file in one value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from config.manifest import Engine, Scheme
from quantize.calibration.datasets import MAX_BAD
from quantize.evaluation.evaluate import DEFAULT_PLAN, EvaluationPlan
from quantize.planning.recipe import Budget, Devices
from quantize.planning.transforms import TransformName
from quantize.running.stage_store import DEFAULT_KEEP_BYTES
from quantize.schemes.settings import SETTINGS, SolverSettings


@dataclass(frozen=True, slots=True)
class TextSize:
    """How much calibration text is used: so many samples, each cut to so many tokens."""

    samples: int
    max_tokens: int


# By the device that solves. More text steadies the Hessians: of the divergence of int4, 84 of the shipped chats instead
# of 16 leave 0.73 on SmolLM2-135M (RESULTS.md). 64 is a guess between quality and time from that one model. A model
# never gets more tokens than it has positions.
DEFAULT_TEXT: Mapping[Engine, TextSize] = MappingProxyType({"cpu": TextSize(64, 2048), "cuda": TextSize(128, 4096)})


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file of calibration text; `weight` is its share of the samples, relative to the others' weights.

    With weight 0 the file is used for the evaluation alone.
    """

    path: Path
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """One variant to make.

    base               directory of the unquantized model
    scheme             its numbers with all overrides, or the budget that the search for them has
    engine             where the variant must load
    out                directory of the variant; `{id}` in it becomes the variant's id
    data               calibration text; empty: the shipped chats
    self_generate      that many prompts of the text are answered by the base itself (0: none)
    replica            address of a running server of the base that answers them; None: transformers does
    max_bad            share of the rows of a file that may be invalid, and are skipped
    samples            chats to calibrate on
    max_tokens         each is cut to this many tokens
    seed               decides which chats, in which order
    transforms         changes of the base before it is solved that leave its function as it is; None: the scheme's
    settings           how hard the solver tries
    backend            program that solves: gptqmodel or auto-gptq
    devices            GPUs that may work, and how much of their memory
    tensor_parallel    GPUs that must be able to share the variant
    allow_fallback     so many modules may be rounded to nearest without failing the variant
    expert_fallback    what becomes of experts that too few tokens reach: rtn rounds them to nearest, fail stops
    evaluation         what is measured at the end, and the limits that differ from the scheme's own
    resume             use the results of stages that earlier runs kept
    keep_bytes         results of stages that stay when the variant is sealed
    log                file that gets the run's log, None for none
    """

    base: Path
    scheme: Scheme | Budget
    engine: Engine
    out: Path
    data: tuple[TextFile, ...] = ()
    self_generate: int = 0
    replica: str | None = None
    max_bad: float = MAX_BAD
    samples: int = DEFAULT_TEXT["cpu"].samples
    max_tokens: int = DEFAULT_TEXT["cpu"].max_tokens
    seed: int = 0
    transforms: tuple[TransformName, ...] | None = None
    settings: SolverSettings = SETTINGS["best"]
    backend: str = "gptqmodel"
    devices: Devices = field(default_factory=Devices)
    tensor_parallel: int = 1
    allow_fallback: int = 0
    expert_fallback: Literal["rtn", "fail"] = "rtn"
    evaluation: EvaluationPlan = DEFAULT_PLAN
    resume: bool = True
    keep_bytes: int = DEFAULT_KEEP_BYTES
    log: Path | None = None

    @property
    def most_solves(self) -> int:
        """How often the model is solved at most: more than once where a scheme is searched."""
        return self.scheme.most_solves if isinstance(self.scheme, Budget) else 1
