"""What a requested run will take, stage by stage, and whether that is there. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from config.manifest import Engine, Scheme
from quantize.base import BaseModel
from quantize.calibration.datasets import CalibrationSplit
from quantize.calibration.records import Record, prompt_of
from quantize.errors import MachineError
from quantize.evaluation.evaluate import EvaluationPlan
from quantize.evaluation.lm_head import PASS_TOKENS
from quantize.planning.cost_estimate import CostEstimate, Room, estimate_cost, rounding_cost
from quantize.planning.recipe import Budget, Devices, Recipe
from quantize.planning.request import Request
from quantize.planning.stage_costs import StageCost, Workload, evaluation_costs, stage_costs
from quantize.planning.transforms import transform_bytes
from quantize.running.memory import Machine
from quantize.schemes.forecast import predicted_bytes
from quantize.schemes.makers import is_data_free
from quantize.schemes.module_config import fused_name

_BYTES_PER_TOKEN = 4  # of UTF-8 text; holds about for European and for East Asian languages alike
# Of a GPU's memory, what a process can use.
GPU_SHARE = 0.9
_GPU_SIZES = (24, 40, 48, 80, 141, 192)
_USUAL_GPU_BYTES = 80 * 10**9
_GIGA = 1e9


@dataclass(frozen=True, slots=True)
class RunCosts:
    """The solver's cost and that of every stage, in order; `shortages` say what this machine lacks, a line each."""

    solving: CostEstimate
    stages: tuple[StageCost, ...]
    shortages: tuple[str, ...] = ()


def run_costs(
    request: Request,
    base: BaseModel,
    scheme: Scheme,
    split: CalibrationSplit,
    machine: Machine,
    *,
    engine: Engine | None = None,
) -> RunCosts:
    """Estimate a run of the settled `scheme` on `engine`, or where the request wants it to run.

    What the machine has counts only if it is one of that engine.
    """
    engine = engine or solving_engine(request)
    present = machine if engine == machine.engine else None
    gpus = usable_gpus(request.devices, machine) if present else ()
    room = Room(present.memory_bytes, int(GPU_SHARE * gpus[0]) if gpus else None) if present else Room()
    tokens = expected_tokens(request, split)
    if is_data_free(scheme):
        solving = rounding_cost(base)
    else:
        solving = estimate_cost(base, tokens, request.settings, engine, machine.cores, room)
    work = _workload(request, base, scheme, split, machine, engine)
    stages = stage_costs(base, solving, work)
    return RunCosts(solving, stages, tuple(_shortages(stages, present, gpus)) if present else ())


def require_room(costs: RunCosts) -> None:
    """Raise MachineError with the first stage that this machine has no room for."""
    if costs.shortages:
        raise MachineError(costs.shortages[0])


def require_evaluation_room(base: BaseModel, plan: EvaluationPlan, variant_bytes: int, machine: Machine) -> None:
    """Raise MachineError with the first part of an evaluation that this machine has no room for."""
    work = Workload(
        engine=machine.engine,
        cores=machine.cores,
        tokens=0,
        longest_tokens=0,
        evaluation=plan,
        held_out_tokens=PASS_TOKENS,  # memory does not grow with more passes
        prompt_tokens=0,
        variant_bytes=variant_bytes,
        memory_bytes=sum(machine.gpu_bytes) or machine.total_bytes,
    )
    for line in _shortages(evaluation_costs(base, work), machine, machine.gpu_bytes):
        raise MachineError(line)


def placed_cost(recipe: Recipe, tokens: int, machine: Machine) -> CostEstimate:
    """Place a recipe's solving in this machine's memory; MachineError where it doesn't fit, with GPTAQ if it has it."""
    gpus = usable_gpus(recipe.devices, machine)
    room = Room(machine.memory_bytes, int(GPU_SHARE * gpus[0]) if gpus else None)
    cost = estimate_cost(recipe.base, tokens, recipe.settings, machine.engine, machine.cores, room)
    if recipe.settings.gptaq and not cost.kept_inputs:
        raise MachineError(
            f"too little memory for GPTAQ: the inputs of {tokens} tokens that it keeps fit neither the GPU nor main "
            "memory; take fewer or shorter samples, or pass --gptaq 0"
        )
    stage = StageCost("solve", cost.seconds, cost.host_bytes, cost.gpu_bytes)
    for line in _shortages([stage], machine, gpus):
        raise MachineError(line)
    return cost


def solving_engine(request: Request) -> Engine:
    """Tell what the solver will run on: named GPUs, or what the variant is for."""
    return "cuda" if request.devices.gpus else request.engine


def usable_gpus(devices: Devices, machine: Machine) -> tuple[int, ...]:
    """Give the bytes of the GPUs that are named, or of all, up to the limit for each."""
    chosen = [machine.gpu_bytes[gpu] for gpu in devices.gpus if gpu < len(machine.gpu_bytes)]
    limit = devices.memory_bytes
    return tuple(min(size, limit) if limit else size for size in chosen or machine.gpu_bytes)


def expected_tokens(request: Request, split: CalibrationSplit) -> int:
    """Guess the tokens of the calibration text from its bytes; of text that isn't written yet, the most it may have."""
    if request.self_generate:
        return request.self_generate * request.max_tokens
    return sum(_lengths(split.calibration, request.max_tokens))


def _workload(
    request: Request, base: BaseModel, scheme: Scheme, split: CalibrationSplit, machine: Machine, engine: Engine
) -> Workload:
    lengths = _lengths(split.calibration, request.max_tokens) or [0]
    held_out = _lengths(split.held_out, request.max_tokens)
    prompts = [_prompt_tokens(record) for record in split.held_out]
    return Workload(
        engine=engine,
        cores=machine.cores,
        tokens=expected_tokens(request, split),
        longest_tokens=request.max_tokens if request.self_generate else max([*lengths, *held_out]),
        evaluation=request.evaluation,
        held_out_tokens=_read_tokens(request.evaluation, held_out),
        prompt_tokens=max(prompts[: request.evaluation.prompts], default=0),
        variant_bytes=predicted_bytes(base, scheme),
        memory_bytes=_generation_memory(request, machine, engine),
        self_generate=request.self_generate,
        max_tokens=request.max_tokens,
        by_replica=request.replica is not None,
        groups=len({fused_name(name) for name in base.shapes}) if isinstance(request.scheme, Budget) else 0,
        cache_scales=scheme.kv_cache is not None,
        most_solves=request.most_solves,
        transformed_bytes=transform_bytes(base, request.transforms or ()),
    )


def _read_tokens(plan: EvaluationPlan, lengths: Sequence[int]) -> int:
    total = sum(lengths[: plan.chats])
    return total if plan.tokens is None else min(plan.tokens, total)


def _generation_memory(request: Request, machine: Machine, engine: Engine) -> int:
    """Give the memory that decides how many texts are written at once; that of a usual GPU where there is none here."""
    if engine == "cpu":
        return machine.total_bytes
    return sum(usable_gpus(request.devices, machine)) or _USUAL_GPU_BYTES


def _lengths(records: Sequence[Record], most: int) -> list[int]:
    return [min(len(record.words.encode()) // _BYTES_PER_TOKEN, most) for record in records]


def _prompt_tokens(record: Record) -> int:
    return len(replace(record, messages=prompt_of(record), completion="").words.encode()) // _BYTES_PER_TOKEN


def _shortages(stages: Sequence[StageCost], machine: Machine, gpus: tuple[int, ...]) -> Iterator[str]:
    for stage in stages:
        if stage.host_bytes > machine.memory_bytes:
            yield (
                f"too little memory for stage {stage.stage!r}: about {_gigabytes(stage.host_bytes)} needed, "
                f"{_gigabytes(machine.memory_bytes)} available; {_advice(stage)}"
            )
        usable = GPU_SHARE * (sum(gpus) if stage.spread else max(gpus, default=0))
        if stage.gpu_bytes > usable:
            yield (
                f"too little GPU memory for stage {stage.stage!r}: about {_gigabytes(stage.gpu_bytes)} needed, "
                f"{_gigabytes(int(usable))} usable on {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}; "
                f"{what_fits(stage.gpu_bytes, spread=stage.spread)}; {_advice(stage)}"
            )


def what_fits(needed_bytes: int, *, spread: bool) -> str:
    """Say which usual GPUs have room for so many bytes."""
    counts = {size: -(-needed_bytes // int(GPU_SHARE * size * _GIGA)) for size in _GPU_SIZES}
    fitting = [f"{count} x {size} GB" for size, count in counts.items() if count <= (8 if spread else 1)]
    return f"it fits {', '.join(fitting)}" if fitting else "it fits no single machine of 8 GPUs"


def _advice(stage: StageCost) -> str:
    if stage.stage.startswith("evaluate: both"):
        return "or leave out generation: --eval-prompts 0, no --tasks"
    if stage.stage == "self-generate":
        return "or let a server of the base answer: --replica URL"
    if stage.stage.startswith("solve"):
        return "take fewer or shorter samples"
    return "use a larger machine"


def _gigabytes(count_bytes: int) -> str:
    return f"{count_bytes / _GIGA:.1f} GB"
