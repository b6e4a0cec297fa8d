"""What a recipe file may say. Every model is frozen and refuses keys that it doesn't know; None is what isn't said."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from config.field_types import ReplicaUrl, SizeBytes
from config.manifest import Override
from quantize.planning.transforms import TransformName

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
KvCache = Literal["auto", "fp8"]
Divergence = Annotated[float, Field(gt=0)]


def _preset_or_numbers(value: object) -> object:
    if isinstance(value, str):
        return {"preset": value}
    if isinstance(value, dict):
        return value
    raise ValueError("is no scheme; write a preset's name, auto, auto-asym, or a table of numbers")


def _path_or_table(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


def parse_share(value: object) -> object:
    """Read `1%`, or a number from 0 to below 1; anything else is left to the field's own check."""
    if not isinstance(value, str):
        return value
    number = value.removesuffix("%").strip()
    try:
        return float(number) / 100 if value.endswith("%") else float(number)
    except ValueError:
        raise ValueError(f"{value!r} is no share, like 1% or 0.01") from None


def _one_or_several(value: object) -> object:
    return [value] if isinstance(value, int | float) else value


def _false(value: object) -> object:
    return False if value in ("false", "no", "off") else value


class Part(BaseModel):
    """A part of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SchemeTable(Part):
    """A preset's name, `auto`, `auto-asym`, or numbers; numbers beside a preset replace the preset's."""

    preset: str | None = None
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    desc_act: bool | None = None
    activation_bits: int | None = None
    format: Literal["gptq", "compressed-tensors"] | None = None
    kv_cache: KvCache | None = None


class OverrideTable(Part):
    """Modules, by shell pattern on their full names, that differ from the scheme or are kept as the base has them."""

    modules: Annotated[str, Field(min_length=1)]
    bits: int | None = None
    group_size: int | None = None
    keep: bool = False

    def override(self, bits: int) -> Override:
        """Give the exception in the manifest's words; `bits` are the scheme's."""
        if self.keep:
            return Override(modules=self.modules)
        return Override.model_validate(
            {"modules": self.modules, "bits": self.bits or bits, "group_size": self.group_size},
        )


class TextTable(Part):
    """A file of calibration text; its weight is relative to those of the others."""

    path: str
    weight: Annotated[float, Field(ge=0)] = 1.0


class CalibrationTable(Part):
    """Which text the solver sees, and how much of it."""

    data: tuple[Annotated[TextTable, BeforeValidator(_path_or_table)], ...] = ()
    self_generate: Count | None = None
    replica: ReplicaUrl | None = None
    max_bad: Annotated[float | None, BeforeValidator(parse_share), Field(ge=0, lt=1)] = None
    samples: Positive | None = None
    max_tokens: Positive | None = None


class SolverTable(Part):
    """How hard the solver tries: a preset, and exceptions from it by the names of SolverSettings."""

    preset: Literal["best", "classic"] | None = None
    damp: Annotated[tuple[float, ...] | None, BeforeValidator(_one_or_several)] = None
    group_order: bool | None = None
    weighted_scales: bool | None = None
    scale_norm: Annotated[float, Field(ge=0)] | None = None
    gptaq: Annotated[float, Field(ge=0)] | None = None
    residual: Annotated[float, Field(ge=0)] | None = None
    shrinkage: Annotated[float, Field(ge=0)] | None = None
    true_sequential: bool | None = None
    # A parameter of AutoGPTQ that goes with desc_act, which no vLLM loads: it may be stated, and is always off.
    static_groups: Annotated[Literal[False] | None, BeforeValidator(_false)] = None


class DevicesTable(Part):
    """GPUs that may work, and how much of each one's memory."""

    gpus: tuple[Count, ...] = ()
    memory: SizeBytes | None = None


class EvaluationTable(Part):
    """How much is measured, and the limits that replace the scheme's own."""

    chats: Positive | None = None
    tokens: Positive | None = None
    prompts: Count | None = None
    seeds: Positive | None = None
    new_tokens: Positive | None = None
    tasks: str | None = None
    task_tokens: Positive | None = None
    limits: dict[str, float] = Field(default_factory=dict)


class RecipeFile(Part):
    """The whole file; relative paths count from its folder."""

    base: str | None = None
    scheme: Annotated[SchemeTable | None, BeforeValidator(_preset_or_numbers)] = None
    max_bytes: Annotated[SizeBytes, Field(gt=0)] | None = None
    max_kl: Divergence | None = None
    overrides: tuple[OverrideTable, ...] = ()
    calibration: CalibrationTable = CalibrationTable()
    seed: int | None = None
    transforms: tuple[TransformName, ...] | None = None
    solver: SolverTable = SolverTable()
    backend: Literal["gptqmodel", "auto-gptq"] | None = None
    devices: DevicesTable = DevicesTable()
    engine: Literal["auto", "cpu", "cuda"] | None = None
    tensor_parallel: Positive | None = None
    allow_fallback: Count | None = None
    expert_fallback: Literal["rtn", "fail"] | None = None
    evaluation: EvaluationTable = EvaluationTable()
    out: str | None = None

    def rooted(self, folder: Path) -> "RecipeFile":
        """Count relative paths from `folder`."""
        data = tuple(
            dataset.model_copy(update={"path": _under(folder, dataset.path)}) for dataset in self.calibration.data
        )
        return self.model_copy(
            update={
                "base": _under(folder, self.base),
                "out": _under(folder, self.out),
                "calibration": self.calibration.model_copy(update={"data": data}),
                "evaluation": self.evaluation.model_copy(update={"tasks": _under(folder, self.evaluation.tasks)}),
            },
        )


def _under(folder: Path, path: str | None) -> str | None:
    return None if path is None else str(folder / Path(path).expanduser())
