"""From what was asked for to a recipe: every check that needs no torch, before any work."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from config.hardware import has_gpu_driver
from config.manifest import Engine, Override, Scheme
from config.quantization import grouped
from quantize.base import BaseModel
from quantize.calibration.datasets import (
    FEWEST_SAMPLES,
    CalibrationSplit,
    Dataset,
    read_datasets,
    shipped_files,
    split_records,
)
from quantize.errors import RecipeError
from quantize.planning.block_form import BLOCK_FORMS
from quantize.planning.recipe import SEARCH_CHATS, Budget, Recipe, chosen_backend
from quantize.planning.request import Request
from quantize.planning.run_costs import run_costs
from quantize.planning.transforms import require_transformable, settled_transforms
from quantize.running.memory import Machine
from quantize.schemes.cache_scales import cache_misfit
from quantize.schemes.engines import choices, expert_refusals, has_amx, refusals, require_engine
from quantize.schemes.fit import fitted, heads_of, matching, misfit, tensor_parallel_degrees, uneven_share
from quantize.schemes.forecast import predicted_bytes
from quantize.schemes.makers import RTN_FP8, is_data_free, require_made
from quantize.schemes.module_config import WeightArgs
from quantize.schemes.scheme import PRESETS, named, require_loadable
from quantize.schemes.settings import SolverSettings, without_gptaq

_FEWEST_TOKENS = 32
_FOUR_BITS = [
    scheme for scheme in PRESETS.values() if scheme.bits == 4 and scheme.compression == "gptq"
]  # widest groups, and so smallest, first
_CPU_INFO = Path("/proc/cpuinfo")


def plan_variant(request: Request, base: BaseModel, machine: Machine) -> tuple[Recipe, CalibrationSplit]:
    """Write down the recipe of a request that was checked, with the records that it draws.

    Completions that the base generated are a file like any other: name it in `request.data` before. GPTAQ is left out
    where the inputs that it keeps fit neither the GPU nor main memory.
    """
    scheme = settled_scheme(request, base)
    datasets, split = calibration_split(request)
    request = settled_request(request, base, scheme)
    costs = run_costs(request, base, scheme, split, machine, engine=machine.engine)
    free = is_data_free(scheme)
    recipe = Recipe(
        base=base,
        scheme=scheme,
        datasets=datasets,
        samples=request.samples,
        max_tokens=request.max_tokens,
        seed=request.seed,
        settings=request.settings if costs.solving.kept_inputs or free else without_gptaq(request.settings),
        backend=chosen_backend(RTN_FP8 if free else request.backend),
        devices=request.devices,
        budget=request.scheme if isinstance(request.scheme, Budget) else None,
        split_by_prompt=split.moved_rows > 0,
        transforms=request.transforms or (),
    )
    return recipe, split


def present_engine() -> Engine:
    """Tell which engine this machine can run, without importing torch."""
    return "cuda" if has_gpu_driver() else "cpu"


def this_cpu_has_amx() -> bool:
    """Tell whether vLLM finds kernels for quantized experts on this machine's CPU."""
    return _CPU_INFO.is_file() and has_amx(_CPU_INFO.read_text())


def check_numbers(request: Request) -> None:
    """Refuse what no base could do: a scheme that doesn't load or isn't made, too few samples, damping out of range."""
    if isinstance(request.scheme, Scheme):
        require_loadable(request.scheme)
        require_engine(request.scheme, request.engine)
        require_made(request.scheme)
    _require_ranges(request.samples, request.max_tokens, request.settings.damp)
    if request.backend == "auto-gptq" and present_engine() != "cuda":
        raise RecipeError("backend auto-gptq needs an NVIDIA GPU, and this machine has none; use --backend gptqmodel")


def settled_scheme(request: Request, base: BaseModel) -> Scheme:
    """Fit the scheme to the base; for a budget, give the smallest scheme that fits, where its search starts."""
    if not base.shapes:
        raise RecipeError(f"{base.directory}: has no linear layers in blocks; GPTQ quantizes decoder models")
    named = request.transforms or ()
    require_transformable(base, None if isinstance(request.scheme, Budget) else request.scheme, named)
    if isinstance(request.scheme, Budget):
        _require_searchable(base)
        scheme = fitted(_smallest(base, request.scheme, request.engine), base)
        _require_within(scheme, base, request.scheme)
    else:
        scheme = fitted(request.scheme, base)
    refused = expert_refusals(scheme, base, amx=this_cpu_has_amx()) | refusals(scheme)
    reason = refused.get(request.engine) or misfit(scheme, base.shapes, base.sizes)
    reason = reason or cache_misfit(scheme, base, request.engine)
    if reason:
        raise RecipeError(f"{base.directory}: {scheme.name} doesn't fit: {reason}")
    _require_shares(base, scheme, request.tensor_parallel)
    return scheme


def settled_request(request: Request, base: BaseModel, scheme: Scheme) -> Request:
    """Fill in what depends on the base, and what on its settled scheme: solver settings and transforms."""
    transforms = settled_transforms(request.transforms, base, scheme)
    return replace(request, settings=settled_settings(request.settings, base), transforms=transforms)


def settled_settings(settings: SolverSettings, base: BaseModel) -> SolverSettings:
    """Leave out what a base is not made for.

    GPTAQ where there are experts: routers choose other tokens for an expert than the unquantized model. What the
    residual stream has lost where outputs are not added to it as they are.
    """
    gptaq = 0.0 if base.modules.has_experts else settings.gptaq
    form = BLOCK_FORMS.get(base.config.get("model_type", ""))
    return replace(settings, gptaq=gptaq, residual=settings.residual if gptaq and form and form.adds else 0.0)


def calibration_split(request: Request) -> tuple[tuple[Dataset, ...], CalibrationSplit]:
    """Read the calibration text and draw the samples from it; CalibrationError lists what is wrong with it."""
    paths = [file.path for file in request.data]
    weights = [file.weight for file in request.data]
    datasets, rows = read_datasets(paths or shipped_files(), weights, request.max_bad)
    spare = SEARCH_CHATS if isinstance(request.scheme, Budget) else 0
    split = split_records(rows, samples=request.samples, seed=request.seed, datasets=datasets, spare=spare)
    return datasets, replace(split, max_bad=request.max_bad)


def _smallest(base: BaseModel, budget: Budget, engine: Engine) -> Scheme:
    every = list(map(_with_zero_points, _FOUR_BITS)) if budget.zero_points else _FOUR_BITS
    fitting = [four_bit for four_bit in every if misfit(four_bit, base.shapes, base.sizes) is None]
    if not fitting:
        raise RecipeError(f"{base.directory}: no scheme fits: {misfit(every[-1], base.shapes, base.sizes)}")
    plain = fitting[0].model_copy(update={"overrides": budget.overrides})
    free = {name: shape for name, shape in base.shapes.items() if not matching(plain, name)}
    least = {name: choices(engine, shape, zero_points=budget.zero_points)[0] for name, shape in free.items()}
    wider = _wider(least, plain)
    return plain.model_copy(update={"overrides": (*budget.overrides, *wider)})


def _with_zero_points(scheme: Scheme) -> Scheme:
    weights = grouped(scheme.bits, scheme.group_size, symmetric=False)
    return named(scheme.model_copy(update={"compression": "pack-quantized", "weights": weights}))


def _wider(least: Mapping[str, WeightArgs], plain: Scheme) -> Iterable[Override]:
    """Exceptions for modules that allow wider groups than the rest, by kind where a whole kind does."""
    kinds: dict[str, set[WeightArgs]] = {}
    for module, weight_args in least.items():
        kinds.setdefault(module.rpartition(".")[2], set()).add(weight_args)
    result: dict[str, Override] = {}
    for module, weight_args in least.items():
        kind = module.rpartition(".")[2]
        pattern = f"*.{kind}" if len(kinds[kind]) == 1 else module
        if weight_args != WeightArgs(plain.bits, plain.group_size):
            result[pattern] = Override(modules=pattern, bits=4, group_size=weight_args.group_size)
    return result.values()


def _require_searchable(base: BaseModel) -> None:
    """The search rounds linear layers of the transformers model one by one: they must be there, by their names."""
    tree = base.modules
    split = any(layer.part is not None and f"{layer.stored_name}.weight" != layer.tensor for layer in tree.layers)
    if tree.has_experts or split:
        held = "all experts of a block in one tensor" if tree.has_experts else "gate and up of a block in one matrix"
        raise RecipeError(
            f"{base.directory}: scheme auto measures single layers, and transformers holds {held}; "
            "choose a scheme, and --override '*.self_attn.*=8' for layers that need more",
        )
    if "text_config" in base.config:
        raise RecipeError(f"{base.directory}: scheme auto supports no multimodal models; choose a scheme")


def _require_within(scheme: Scheme, base: BaseModel, budget: Budget) -> None:
    least = predicted_bytes(base, scheme)
    if budget.max_bytes is not None and least > budget.max_bytes:
        raise RecipeError(
            f"max_bytes {budget.max_bytes / 1e6:.1f} MB: the smallest variant that loads, {scheme.name}, has "
            f"{least / 1e6:.1f} MB; raise the budget",
        )


def _require_shares(base: BaseModel, scheme: Scheme, degree: int) -> None:
    heads = heads_of(base)
    reason = uneven_share(base.shapes, scheme, degree, heads)
    if reason:
        possible = ", ".join(map(str, tensor_parallel_degrees(base.shapes, scheme, heads)))
        raise RecipeError(f"{base.directory}: tensor_parallel {degree} doesn't fit: {reason}; possible: {possible}")


def _require_ranges(samples: int, max_tokens: int, damp: Sequence[float]) -> None:
    if samples < FEWEST_SAMPLES:
        raise RecipeError(f"{samples} samples are too few: GPTQ needs {FEWEST_SAMPLES} or more")
    if max_tokens < _FEWEST_TOKENS:
        raise RecipeError(f"{max_tokens} tokens a sample are too few: pass {_FEWEST_TOKENS} or more")
    for step in damp:
        if not 0 < step < 1:
            raise RecipeError(f"damp {step:g} is out of range: pass a number between 0 and 1, like 0.01")
