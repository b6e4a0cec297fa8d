"""What transformers would say while it loads a base: tensors that are missing, left over, or of another shape.

The model is built on the meta device and loaded from the headers alone, with transformers' own renaming and merging
of checkpoint tensors: the result is `output_loading_info` of `from_pretrained`, without reading a weight.
A missing tensor is initialized at random by transformers, without an error: such a base must not be quantized.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from quantize.base import BaseModel
from quantize.errors import RecipeError
from quantize.running.progress import ProgressReporter
from quantize.running.worker import run_worker

_CHILD = "quantize.load_report_child"
_KINDS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class ShapeMismatch:
    """A tensor whose stored shape is not the one that config.json implies."""

    name: str
    stored: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Names as the model class `architecture` has them, `unexpected` ones as the files have them.

    `blocks` is the number of layers that config.json says.
    """

    architecture: str
    blocks: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[ShapeMismatch, ...] = ()

    def problem(self) -> str | None:
        """Say why the base can't be loaded as it is, and what to do; None if it can."""
        if self.missing:
            instead = f"; unknown: {_listed(self.unexpected)}" if self.unexpected else ""
            return (
                f"{_counted(self.missing)} missing that {self.architecture} needs: {_listed(self.missing)}{instead}; "
                "save or copy the model again, with every tensor under its name in transformers"
            )
        stored_blocks = _blocks(self.unexpected)
        if stored_blocks > self.blocks:
            return (
                f"config.json says {self.blocks} layers, and the weights have {stored_blocks}; use the config.json of "
                "these weights"
            )
        if self.mismatched:
            first = self.mismatched[0]
            others = f" ({len(self.mismatched)} such tensors)" if len(self.mismatched) > 1 else ""
            return (
                f"{first.name} has shape {_shape(first.stored)}, and config.json implies {_shape(first.expected)}"
                f"{others}; use the config.json of these weights"
            )
        return None

    def note(self) -> str | None:
        """Say which tensors no module of the model has."""
        if not self.unexpected:
            return None
        return f"{_counted(self.unexpected)} unknown to {self.architecture}, not quantized: {_listed(self.unexpected)}"


def check_base(base: BaseModel, environ: Mapping[str, str], progress: ProgressReporter) -> None:
    """Check that every tensor of a base is loaded, and log which of its files and tensors are not used.

    Takes seconds and reads no weights; belongs before everything that takes longer. RecipeError names what is missing.
    """
    with progress.stage("base", "checks"):
        report = read_report(base, environ)
    problem = report.problem()
    if problem:
        raise RecipeError(f"{base.directory}: {problem}")
    for note in (*base.notes, report.note()):
        if note:
            progress.log(f"base: {note}")


def read_report(base: BaseModel, environ: Mapping[str, str]) -> LoadReport:
    """Build a base on the meta device, in a child process; RecipeError if transformers can't."""
    with TemporaryDirectory(prefix="quantgate-") as folder:
        job = {"base": str(base.directory.resolve())}
        result = run_worker(_CHILD, job, folder=Path(folder), environ=environ, on_progress=_ignore)
    return LoadReport(
        architecture=result["architecture"],
        blocks=result["blocks"],
        missing=tuple(result["missing"]),
        unexpected=tuple(result["unexpected"]),
        mismatched=tuple(ShapeMismatch(**mismatch) for mismatch in result["mismatched"]),
    )


def _ignore(_done: int, _total: int) -> None:
    """Take no notice of progress: the child is done in seconds."""


def _blocks(unexpected: Sequence[str]) -> int:
    """Count the blocks up to the last of these tensors' own, MTP blocks (DeepSeek's `eh_proj`) left out."""
    numbers = {name: int(found[1]) for name in unexpected if (found := re.search(r"(?:^|\.)layers\.(\d+)\.", name))}
    predictors = {number for name, number in numbers.items() if name.endswith("eh_proj.weight")}
    return max(set(numbers.values()) - predictors, default=-1) + 1


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _listed(names: Sequence[str]) -> str:
    """Name the first kinds of tensors: of those that differ by layer or expert only, the first, and how many."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    shown = [members[0] + (f" (in {len(members)} layers)" if len(members) > 1 else "") for members in kinds.values()]
    more = f" and {len(shown) - _KINDS_SHOWN} more" if len(shown) > _KINDS_SHOWN else ""
    return ", ".join(shown[:_KINDS_SHOWN]) + more


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
