"""What `--plan` tells before any work: size, memory, time, engines, limits; a value, and its text and JSON. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from config.manifest import Engine, Override, Scheme
from config.vllm import ENGINES
from quantize.base import BaseModel
from quantize.calibration.datasets import CalibrationSplit, Dataset
from quantize.evaluation.evaluate import EvaluationPlan
from quantize.evaluation.verdict import limits_for
from quantize.modules import ModuleTree
from quantize.planning.cost_estimate import CostEstimate
from quantize.planning.recipe import Budget
from quantize.planning.request import Request
from quantize.planning.run_costs import expected_tokens, run_costs
from quantize.planning.stage_costs import StageCost
from quantize.planning.transforms import (
    TransformName,
    planned_base,
    rounds_activations,
    transform_bytes,
    unsmoothed_reason,
)
from quantize.running.memory import Machine
from quantize.schemes.cache_scales import token_bytes
from quantize.schemes.engines import expert_refusals, kernels, refusals
from quantize.schemes.fit import heads_of, tensor_parallel_degrees
from quantize.schemes.forecast import disk_bytes, predicted_tensors
from quantize.schemes.makers import RTN_FP8, is_data_free
from quantize.schemes.module_config import weight_args_of
from quantize.schemes.settings import SolverSettings

# Figures that only paired generations, or only questions with answers, can have.
_OF_GENERATIONS = frozenset({"length_ratio", "unfinished_increase", "repeating_increase", "unclosed_increase"})
_OF_TASKS = frozenset({"recovery", "flips"})
_OVERRIDES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class EngineSupport:
    """Whether an engine loads the variant: with which kernels, or why not."""

    loads: bool
    reason: str


@dataclass(frozen=True, slots=True)
class DryRunPlan:
    """A variant that doesn't exist yet; sizes in bytes, times in seconds, both estimates.

    `tensor_bytes` maps each tensor to its size; `kept_bytes` are those of tensors that stay as the base has them.
    `data` are lines about the calibration files, `shortages` about what this machine lacks for the run.
    `cache_token_bytes` are those of a token in the KV cache, and what they would be in the base's dtype.
    """

    base: str
    base_bytes: int
    scheme: Scheme
    budget: Budget | None
    tensor_bytes: Mapping[str, int]
    kept_bytes: int
    quantized_modules: int
    quantized_parameters: int
    samples: int
    tokens: int
    settings: SolverSettings
    backend: str
    cost: CostEstimate
    stages: tuple[StageCost, ...]
    engines: Mapping[Engine, EngineSupport]
    tensor_parallel: tuple[int, ...]
    disk_bytes: int
    limits: Mapping[str, float]
    data: tuple[str, ...] = ()
    experts: str = ""
    shortages: tuple[str, ...] = ()
    transforms: tuple[TransformName, ...] = ()
    untransformed: str = ""
    cache_token_bytes: tuple[int, int] = (0, 0)

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(self.tensor_bytes.values())


def dry_run_plan(
    request: Request,
    base: BaseModel,
    scheme: Scheme,
    split: CalibrationSplit,
    machine: Machine,
    datasets: Sequence[Dataset] = (),
    *,
    amx: bool = False,
) -> DryRunPlan:
    """Tell what a request will make of a base; `scheme` is the settled one, `amx` a feature of the CPU."""
    modules = {name for name in base.shapes if weight_args_of(name, scheme)}
    stored_in = base.modules.stored_in
    transforms = request.transforms or ()
    planned = planned_base(base, transforms)
    kept = [tensor.bytes for name, tensor in planned.tensors.items() if modules.isdisjoint(stored_in.get(name, ()))]
    costs = run_costs(request, base, scheme, split, machine)
    return DryRunPlan(
        base=f"{base.name} ({base.dtype})",
        base_bytes=base.bytes,
        scheme=scheme,
        budget=request.scheme if isinstance(request.scheme, Budget) else None,
        tensor_bytes=predicted_tensors(planned, scheme),
        kept_bytes=sum(kept),
        quantized_modules=len(modules),
        quantized_parameters=sum(prod(base.shapes[name]) for name in modules),
        samples=request.self_generate or len(split.calibration),
        tokens=expected_tokens(request, split),
        settings=request.settings,
        backend=request.backend,
        cost=costs.solving,
        stages=costs.stages,
        engines=engine_support(scheme, base, amx=amx),
        tensor_parallel=tensor_parallel_degrees(base.shapes, scheme, heads_of(base)),
        disk_bytes=disk_bytes(planned, scheme, request.most_solves) + transform_bytes(base, transforms),
        limits=applied_limits(lowest_bits(scheme), request.evaluation),
        data=tuple(line for dataset in datasets for line in dataset.summary()),
        experts=experts_line(base.modules, scheme),
        shortages=costs.shortages,
        transforms=transforms,
        untransformed=unsmoothed_reason(base) if rounds_activations(scheme) and not transforms else "",
        cache_token_bytes=token_bytes(scheme, base),
    )


def experts_line(tree: ModuleTree, scheme: Scheme) -> str:
    """Say how many experts are quantized, and what they leave out of the solver; nothing for a dense model."""
    if not tree.has_experts:
        return ""
    experts = {layer.stored_name.rpartition(".")[0]: layer.stored_name for layer in tree.layers if layer.is_expert}
    quantized = sum(weight_args_of(name, scheme) is not None for name in experts.values())
    return f"{len(experts)} experts, {quantized} quantized; routers stay as they are; GPTAQ is off"


def lowest_bits(scheme: Scheme) -> int:
    """Tell the bits that a variant is judged by: the fewest of any module."""
    return min([scheme.bits, *(override.bits for override in scheme.overrides if override.bits is not None)])


def applied_limits(bits: int, plan: EvaluationPlan) -> dict[str, float]:
    """Give the limits on figures that will be measured; RecipeError for a limit that doesn't exist."""
    unmeasured = (frozenset() if plan.prompts else _OF_GENERATIONS) | (frozenset() if plan.tasks else _OF_TASKS)
    return {name: value for name, value in limits_for(bits, plan.limits).items() if name not in unmeasured}


def engine_support(scheme: Scheme, base: BaseModel, *, amx: bool = False) -> dict[Engine, EngineSupport]:
    """Tell for each engine how it will load a scheme, or why it won't."""
    reasons = expert_refusals(scheme, base, amx=amx) | refusals(scheme)
    return {
        engine: EngineSupport(False, reasons[engine])
        if engine in reasons
        else EngineSupport(True, kernels(scheme, engine))
        for engine in ENGINES
    }


def as_json(plan: DryRunPlan) -> dict[str, Any]:
    """Give an outline as plain data, for scripts."""
    payload = asdict(plan) | {"scheme": plan.scheme.model_dump(mode="json"), "bytes": plan.bytes}
    payload["effort"] = {**payload.pop("cost"), "seconds": plan.cost.seconds}
    payload["budget"] = (
        None if plan.budget is None else {"max_bytes": plan.budget.max_bytes, "max_kl": plan.budget.max_kl}
    )
    return payload


def as_text(plan: DryRunPlan) -> str:
    """Give an outline as lines for people."""
    rows = [
        ("base", f"{plan.base}, {_size(plan.base_bytes)}"),
        ("scheme", _scheme_line(plan)),
        *_override_rows(plan.scheme.overrides),
        ("size", _size_line(plan)),
        *((("experts", plan.experts),) if plan.experts else ()),
        *(("data", line) for line in plan.data),
        *_cache_rows(plan),
        *_solver_rows(plan),
        ("time", _time_line(plan.cost, plan.stages)),
        ("memory", _memory_line(plan.stages)),
        *_stage_rows(plan.stages),
        ("disk", f"{_size(plan.disk_bytes)} free in $QUANTGATE_HOME"),
        *((engine, ("loads: " if on.loads else "won't load: ") + on.reason) for engine, on in plan.engines.items()),
        ("GPUs", f"can be shared by {', '.join(map(str, plan.tensor_parallel))} (tensor parallel)"),
        ("gates", ", ".join(f"{name} {value:g}" for name, value in plan.limits.items())),
        *(("problem", line) for line in plan.shortages),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _solver_rows(plan: DryRunPlan) -> list[tuple[str, str]]:
    if is_data_free(plan.scheme):
        return [("solver", f"{RTN_FP8}: weights are rounded to nearest, without calibration data")]
    rows = [
        ("calibration", f"{plan.samples} samples, about {plan.tokens:,} tokens"),
        *_transform_rows(plan),
        ("solver", f"{plan.backend}, {_settings_line(plan.settings)}"),
    ]
    return [*rows, ("GPTAQ", _kept_inputs_line(plan.cost))] if plan.settings.gptaq else rows


def _transform_rows(plan: DryRunPlan) -> list[tuple[str, str]]:
    if plan.transforms:
        return [("transforms", ", ".join(plan.transforms))]
    return [("transforms", f"smooth is off: {plan.untransformed}")] if plan.untransformed else []


def _cache_rows(plan: DryRunPlan) -> list[tuple[str, str]]:
    if plan.scheme.kv_cache is None:
        return []
    used, plain = (size / 1e3 for size in plan.cache_token_bytes)
    text = f"{plan.scheme.kv_cache.precision}, calibrated scales; {used:.1f} kB a token instead of {plain:.1f} kB"
    return [("KV cache", f"{text}; on CPU it needs AVX-512 or AMX, and vLLM 0.32 cuts off where GPUs round")]


def _scheme_line(plan: DryRunPlan) -> str:
    zeros = "" if plan.scheme.sym else ", zero points"
    numbers = f"{plan.scheme.bits} bits, group {plan.scheme.group_size}{zeros}, {plan.scheme.format}"
    if plan.budget is None:
        return f"{plan.scheme.name}: {numbers}"
    limit = f"max_kl {plan.budget.max_kl:g}" if plan.budget.max_kl else f"max_bytes {_size(plan.budget.max_bytes or 0)}"
    name = "auto-asym" if plan.budget.zero_points else "auto"
    return f"{name} within {limit}; what follows is the smallest, {plan.scheme.name}, where the search starts"


def _override_rows(overrides: Sequence[Override]) -> list[tuple[str, str]]:
    rows = [(f"  {one.modules}", _override_line(one.bits, one.group_size)) for one in overrides[:_OVERRIDES_SHOWN]]
    more = len(overrides) - len(rows)
    return [*rows, ("  ...", f"and {more} more overrides")] if more else rows


def _override_line(bits: int | None, group_size: int | None) -> str:
    if bits is None:
        return "kept as the base has them"
    return f"{bits} bits" + ("" if group_size is None else f", group {group_size}")


def _size_line(plan: DryRunPlan) -> str:
    return (
        f"{_size(plan.bytes)} ({plan.bytes / plan.base_bytes:.0%} of the base): "
        f"{_size(plan.bytes - plan.kept_bytes)} in {plan.quantized_modules} quantized modules, "
        f"{_size(plan.kept_bytes)} kept"
    )


def _settings_line(settings: SolverSettings) -> str:
    damp = " ".join(f"{step:g}" for step in settings.damp)
    order = "group order" if settings.group_order else "natural order"
    norm = f"scale search (norm {settings.scale_norm:g})" if settings.scale_norm else "no scale search"
    if settings.weighted_scales:
        norm = "weighted scale search"
    gptaq = f", GPTAQ {settings.gptaq:g}" if settings.gptaq else ""
    residual = f", residual stream {settings.residual:g}" if settings.gptaq and settings.residual else ""
    shrinkage = f", shrinkage {settings.shrinkage:g}" if settings.shrinkage else ""
    return f"{order}, {norm}{gptaq}{residual}{shrinkage}, damping {damp}"


def _time_line(solving: CostEstimate, stages: Sequence[StageCost]) -> str:
    each, every = _duration(solving.block_seconds), _duration(solving.seconds)
    total = _duration(sum(stage.seconds for stage in stages))
    return f"about {total}; the solver: {each} a layer, {every} for {solving.blocks} (estimate for {solving.assumed})"


def _memory_line(stages: Sequence[StageCost]) -> str:
    host = max(stage.host_bytes for stage in stages)
    gpu = max(stage.gpu_bytes for stage in stages)
    return f"at most {_size(host)} of the machine{f', {_size(gpu)} of the GPUs' if gpu else ''} (estimate), by stage:"


def _stage_rows(stages: Sequence[StageCost]) -> list[tuple[str, str]]:
    def gpu(stage: StageCost) -> str:
        return f", {_size(stage.gpu_bytes)} of {'all GPUs' if stage.spread else 'one GPU'}" if stage.gpu_bytes else ""

    return [
        ("  stage", f"{stage.stage:<24}{_duration(stage.seconds):>8}, {_size(stage.host_bytes)}{gpu(stage)}")
        for stage in stages
    ]


def _kept_inputs_line(solving: CostEstimate) -> str:
    if solving.kept_inputs is None:
        return "left out: the inputs that it keeps fit neither the GPU nor main memory"
    place = "on the GPU" if solving.kept_inputs == "gpu" else "in main memory"
    return f"keeps {_size(solving.kept_input_bytes)} of inputs {place}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _size(count_bytes: int) -> str:
    return f"{count_bytes / 1e9:.1f} GB" if count_bytes >= 1e9 else f"{count_bytes / 1e6:.1f} MB"
