"""What the report shows of a variant: its manifest and the files beside it about modules, evaluation and speed."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from config.capacity import FILE_NAME as CAPACITY_FILE
from config.capacity import Capacity, read_capacity
from config.manifest import Manifest
from config.measurements import EVALUATION_FILE
from quantize.errors import VariantError
from quantize.variants.quant_log import quant_log_file


class _Shown(BaseModel):
    """A part of a JSON file: frozen; keys that the report doesn't show are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ModuleResult(_Shown):
    """A quantized module; `loss` is None if it was rounded to nearest (`fallback`)."""

    module: str
    bits: int | None = None
    damp: float | None = None
    loss: float | None = None
    fallback: bool = False


class Modules(_Shown):
    """The solver's log of modules."""

    modules: tuple[ModuleResult, ...] = ()


class KlHistogram(_Shown):
    """Tokens by their KL divergence; `edges` has one value more than `counts`."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


class WorstSample(_Shown):
    """A held-out sample at its worst token, with the likeliest tokens of both models and their probabilities."""

    where: str = ""
    kl_mean: float = 0.0
    kl_here: float | None = None
    place: int | None = None
    text: str = ""
    parent: str = ""
    variant: str = ""
    parent_top: tuple[tuple[str, float], ...] = ()
    variant_top: tuple[tuple[str, float], ...] = ()


class CompletionPair(_Shown):
    """Completions of one prompt by parent and variant."""

    prompt: str = ""
    seed: int | None = None
    parent: str = ""
    variant: str = ""
    parent_tokens: int | None = None
    variant_tokens: int | None = None
    parent_finished: bool = False
    variant_finished: bool = False


class EvaluationRecord(_Shown):
    """`evaluation.json`."""

    kl_histogram: KlHistogram | None = None
    worst: tuple[WorstSample, ...] = ()
    generations: tuple[CompletionPair, ...] = ()


@dataclass(frozen=True, slots=True)
class VariantRecord:
    """A variant's manifest with the contents of the files beside it; a missing file is an empty value."""

    directory: Path
    manifest: Manifest
    modules: tuple[ModuleResult, ...]
    evaluation: EvaluationRecord
    capacity: Capacity

    @property
    def decode_tokens_per_second(self) -> dict[str, float]:
        """Output rate of one request at the lowest measured concurrency, by machine."""
        by_machine = self.capacity.by_machine()
        return {machine: result.loads[0].decode_tokens_per_second for machine, result in by_machine.items()}


def read_variant_record(directory: Path, manifest: Manifest) -> VariantRecord:
    """Read the files beside a manifest; VariantError for one that is invalid."""
    return VariantRecord(
        directory=directory,
        manifest=manifest,
        modules=_read(quant_log_file(directory), Modules).modules,
        evaluation=_read(directory / EVALUATION_FILE, EvaluationRecord),
        capacity=read_capacity(directory / CAPACITY_FILE),
    )


_Model = TypeVar("_Model", bound=_Shown)


def _read(path: Path, model: type[_Model]) -> _Model:
    if not path.is_file():
        return model()
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "top level"
        raise VariantError(f"{path}: {where}: {first['msg']}; evaluate or copy the variant again") from None
