"""Flags and recipe file -> one request: a given flag wins, the file fills the rest, defaults come last. Pure."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from config.manifest import Engine, Override, Scheme
from quantize.calibration.datasets import MAX_BAD
from quantize.errors import RecipeError
from quantize.evaluation.evaluate import DEFAULT_PLAN, REPLICA_SAMPLE_TOKENS, EvaluationPlan
from quantize.planning.recipe import Budget, Devices
from quantize.planning.recipe_file import AUTO, AUTO_ASYMMETRIC, SEARCHED, scheme_of
from quantize.planning.recipe_schema import EvaluationTable, OverrideTable, RecipeFile, SchemeTable, SolverTable
from quantize.planning.request import DEFAULT_TEXT, Request, TextFile
from quantize.planning.transforms import NO_TRANSFORM, TransformName, in_order
from quantize.running.stage_store import DEFAULT_KEEP_BYTES
from quantize.schemes.scheme import named, preset
from quantize.schemes.settings import SETTINGS, SolverSettings

_Value = TypeVar("_Value")
# Beside these a recipe's solver table states what a SolverSettings has no word for.
_NO_SETTINGS = frozenset({"preset", "static_groups"})
_SETTING_FLAGS = ("group_order", "weighted_scales", "scale_norm", "gptaq", "residual", "shrinkage")


def resolve(options: argparse.Namespace, recipe: RecipeFile, *, present: Engine) -> Request:
    """Merge parsed flags (None where not given) with a recipe; `present` is what engine `auto` means, and
    where the work is done unless GPUs are named.

    RecipeError: base, scheme or target is in neither.
    """
    text = recipe.calibration
    devices = _devices(options, recipe)
    size = DEFAULT_TEXT["cuda" if devices.gpus else present]
    engine: Engine | Literal["auto"] = first(options.engine, recipe.engine, "auto")
    return Request(
        base=_required(options.model, recipe.base, "base", "pass MODEL, or write `base:` in the recipe"),
        scheme=chosen_scheme(options, recipe),
        engine=present if engine == "auto" else engine,
        out=_target(options, recipe),
        data=tuple(options.data or (TextFile(Path(file.path), file.weight) for file in text.data)),
        self_generate=first(options.self_generate, text.self_generate, 0),
        replica=first(options.replica, text.replica, None),
        max_bad=first(options.max_bad, text.max_bad, MAX_BAD),
        samples=first(options.samples, text.samples, size.samples),
        max_tokens=first(options.max_tokens, text.max_tokens, size.max_tokens),
        seed=first(options.seed, recipe.seed, 0),
        transforms=chosen_transforms(options, recipe),
        settings=chosen_settings(options, recipe.solver),
        backend=first(options.backend, recipe.backend, "gptqmodel"),
        devices=devices,
        tensor_parallel=first(options.tensor_parallel, recipe.tensor_parallel, 1),
        allow_fallback=first(options.allow_fallback, recipe.allow_fallback, 0),
        expert_fallback=first(options.expert_fallback, recipe.expert_fallback, "rtn"),
        evaluation=chosen_evaluation(options, recipe.evaluation),
        resume=options.resume,
        keep_bytes=DEFAULT_KEEP_BYTES if options.keep_bytes is None else options.keep_bytes,
        log=options.log,
    )


def chosen_scheme(options: argparse.Namespace, recipe: RecipeFile) -> Scheme | Budget:
    """Take the scheme of the flags or of the recipe, exceptions of both, those of the flags first."""
    table = SchemeTable(preset=options.scheme) if options.scheme else recipe.scheme
    given = (options.max_bytes, options.max_kl)
    max_bytes, max_kl = given if given != (None, None) else (recipe.max_bytes, recipe.max_kl)
    exceptions = (*(options.override or ()), *recipe.overrides)
    if table is None and (max_bytes or max_kl):
        table = SchemeTable(preset=AUTO)
    if table is None:
        raise RecipeError("no scheme: pass --scheme, or write `scheme:` in the recipe")
    if options.kv_cache is not None:
        table = table.model_copy(update={"kv_cache": options.kv_cache})
    if table.preset in SEARCHED and table.kv_cache == "fp8":
        raise RecipeError("--kv-cache fp8: a scheme with a budget has no FP8 KV cache; name a scheme, like w4a16-asym")
    if table.preset in SEARCHED:
        budget = _budget(max_bytes, max_kl, exceptions)
        return replace(budget, zero_points=table.preset == AUTO_ASYMMETRIC)
    if given != (None, None):
        raise RecipeError("--max-bytes and --max-kl are budgets of `--scheme auto`, and this scheme is fixed")
    if options.scheme:
        preset(options.scheme)
    scheme = scheme_of(table)
    return named(scheme.model_copy(update={"overrides": tuple(one.override(scheme.bits) for one in exceptions)}))


def chosen_settings(options: argparse.Namespace, table: SolverTable) -> SolverSettings:
    """Start from a preset, apply the recipe's exceptions, then those of the flags.

    A preset that a flag names replaces the recipe's whole solver table.
    """
    said = {} if options.solver else table.model_dump(exclude_none=True, exclude=set(_NO_SETTINGS))
    given = {name: getattr(options, name) for name in _SETTING_FLAGS if getattr(options, name) is not None}
    damp = {"damp": tuple(options.damp)} if options.damp else {}
    return replace(SETTINGS[first(options.solver, table.preset, "best")], **said | given | damp)


def chosen_transforms(options: argparse.Namespace, recipe: RecipeFile) -> tuple[TransformName, ...] | None:
    """Take the transforms that are named; None leaves the choice to the scheme, which `--solver classic` does not."""
    names = options.transform
    if names is not None:
        if NO_TRANSFORM in names and len(names) > 1:
            raise RecipeError(f"--transform {NO_TRANSFORM} beside others; remove one")
        return in_order(tuple(names))
    if recipe.transforms is not None:
        return in_order(recipe.transforms)
    return () if first(options.solver, recipe.solver.preset, "best") == "classic" else None


def chosen_evaluation(options: argparse.Namespace, table: EvaluationTable) -> EvaluationPlan:
    """Fill in what neither flags nor table say about the evaluation."""
    default = DEFAULT_PLAN
    tasks = first(options.tasks, table.tasks, None)
    return EvaluationPlan(
        chats=first(options.eval_chats, table.chats, default.chats),
        tokens=first(options.eval_tokens, table.tokens, default.tokens),
        prompts=first(options.eval_prompts, table.prompts, default.prompts),
        seeds=first(options.eval_seeds, table.seeds, default.seeds),
        new_tokens=first(options.eval_new_tokens, table.new_tokens, default.new_tokens),
        tasks=Path(tasks) if tasks else None,
        task_tokens=first(options.task_tokens, table.task_tokens, default.task_tokens),
        limits={**table.limits, **dict(options.limit or ())},
    )


def evaluation_of(options: argparse.Namespace) -> EvaluationPlan:
    """Take what is measured from the flags of `evaluate` and `adopt`, URLs of replicas included.

    RecipeError for the URL of a parent without that of its variant.
    """
    if options.parent_replica and not options.replica:
        raise RecipeError("--parent-replica needs --replica, the URL of a server of the variant")
    plan = chosen_evaluation(options, EvaluationTable())
    return replace(plan, replica=options.replica, parent_replica=options.parent_replica)


def evaluation_max_tokens(options: argparse.Namespace, present: Engine) -> int:
    """Tell to how many tokens `evaluate` and `adopt` cut a chat."""
    given: int | None = options.max_tokens
    return given or (REPLICA_SAMPLE_TOKENS if options.replica else DEFAULT_TEXT[present].max_tokens)


def first(flag: Any, said: Any, default: _Value) -> _Value:
    """Take the first that is not None."""
    value: _Value = flag if flag is not None else said if said is not None else default
    return value


def _budget(max_bytes: int | None, max_kl: float | None, exceptions: tuple[OverrideTable, ...]) -> Budget:
    if (max_bytes is None) == (max_kl is None):
        raise RecipeError(
            "scheme auto needs one budget: --max-bytes 19GB or --max-kl 0.05 (in a recipe max_bytes, max_kl)"
        )
    return Budget(max_bytes, max_kl, tuple(map(_stated, exceptions)))


def _stated(exception: OverrideTable) -> Override:
    if exception.bits is None and not exception.keep:
        raise RecipeError(f"override {exception.modules!r}: with scheme auto it needs bits, or keep")
    return exception.override(0)


def _devices(options: argparse.Namespace, recipe: RecipeFile) -> Devices:
    return Devices(
        gpus=first(options.gpus, recipe.devices.gpus or None, ()),
        memory_bytes=first(options.gpu_memory, recipe.devices.memory, None),
    )


def _target(options: argparse.Namespace, recipe: RecipeFile) -> Path:
    if options.plan and options.out is None and recipe.out is None:
        return Path("{id}")
    return _required(options.out, recipe.out, "target", "pass --out, or write `out:` in the recipe")


def _required(flag: Path | None, said: str | None, what: str, advice: str) -> Path:
    if flag is None and said is None:
        raise RecipeError(f"no {what}: {advice}")
    return Path(first(flag, said, ""))
