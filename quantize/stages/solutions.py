"""What a search for `scheme: auto` does between its decisions: solve assignments, measure them, put units together.

A mixture takes each unit from one of several solutions of the whole model: its files are links to theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from config.manifest import Scheme
from quantize.backends.losses import SolvedModule
from quantize.backends.protocol import QuantizeResult
from quantize.mixed_precision.allocation import Options
from quantize.mixed_precision.auto_scheme import (
    by_module,
    kept_bytes,
    measured_line,
    numbers_of,
    options_of,
    search_texts,
)
from quantize.mixed_precision.estimate import Estimate, Measured, alone_of, first_estimate, plausible_changes
from quantize.mixed_precision.module_groups import ModuleGroup, kinds_of, module_groups_of, written
from quantize.mixed_precision.solves import Assignment, bytes_of
from quantize.planning.recipe import Budget
from quantize.running.files import link_or_copy
from quantize.running.stage_store import StageKey, stage_key
from quantize.running.worker import run_worker
from quantize.schemes.fit import heads_of
from quantize.schemes.scheme import named
from quantize.schemes.settings import SolverSettings
from quantize.stages.solve import SolvedLayers, solve
from quantize.stages.tokens import Tokens
from quantize.stages.variant_run import VariantRun

_MODULE = "quantize.mixed_precision.sensitivity"
_LIBRARIES = ("torch", "transformers")
# Raise this when the same job would be measured otherwise.
_REVISION = 4


@dataclass(frozen=True, slots=True)
class Search:
    """What all rounds share: units with their prices in bytes, and solutions of the whole model."""

    run: VariantRun
    tokens: Tokens
    budget: Budget
    module_groups: tuple[ModuleGroup, ...]
    priced: Options
    kept_bytes: int
    texts: Mapping[str, Sequence[Mapping[str, Any]]]
    solves: tuple[Assignment, ...] = ()
    solved: tuple[SolvedLayers, ...] = ()


@dataclass(frozen=True, slots=True)
class Solution:
    """An assignment as it was measured, and its solved modules."""

    measured: Measured
    solved: SolvedLayers


def search_of(run: VariantRun, tokens: Tokens, budget: Budget) -> Search:
    """Price every unit of a model; nothing is solved yet."""
    base, options = run.recipe.base, run.options
    module_groups = module_groups_of(
        base.shapes,
        options.engine,
        budget.overrides,
        zero_points=budget.zero_points,
        tensor_parallel=options.tensor_parallel,
        heads=heads_of(base),
    )
    priced = {group.name: options_of(group, base.shapes, zero_points=budget.zero_points) for group in module_groups}
    samples = tokens.samples.spare or tokens.samples.calibration
    return Search(run, tokens, budget, module_groups, priced, kept_bytes(base, module_groups), search_texts(samples))


def scheme_of(search: Search, assignment: Assignment) -> Scheme:
    """Write an assignment as a scheme."""
    modules = list(search.run.recipe.base.shapes)
    return written(search.module_groups, assignment, modules, zero_points=search.budget.zero_points)


def with_solution(search: Search, assignment: Assignment, settings: SolverSettings, called: str) -> Search:
    """Solve an assignment as a scheme of its own."""
    run = search.run
    scheme = named(scheme_of(search, assignment))
    run.context.progress.log(f"auto: {called}: {scheme.name}")
    recipe = replace(run.recipe, scheme=scheme, settings=settings, budget=None)
    solved = solve(replace(run, recipe=recipe), search.tokens)
    return replace(search, solves=(*search.solves, assignment), solved=(*search.solved, solved))


def solved_as_whole(search: Search, assignment: Assignment, called: str) -> Solution:
    """Solve an assignment with all that the recipe's solver has, and measure it."""
    alone = replace(search, solves=(), solved=())
    alone = with_solution(alone, assignment, search.run.recipe.settings, called)
    found = measured(alone, [assignment])[0]
    search.run.context.progress.log(measured_line(found))
    return Solution(found, alone.solved[0])


def first_look(search: Search) -> tuple[Estimate, list[Measured]]:
    """Measure all solutions, what each kind of units adds to the parent, and what each unit of the first one does."""
    kinds = {kind: [group.name for group in groups] for kind, groups in kinds_of(search.module_groups).items()}
    modules = {group.name: group.modules for group in search.module_groups}
    of_kinds = {kind: [module for unit in units for module in modules[unit]] for kind, units in kinds.items()}
    found = [
        _measurements(search, [number], [assignment], of_kinds if number else {**of_kinds, **modules})
        for number, assignment in enumerate(search.solves)
    ]
    added = [each["units"] for each in found]
    kind_of = {unit: kind for kind, units in kinds.items() for unit in units}
    alone = alone_of({unit: added[0][unit] for unit in modules}, added, kind_of, search.solves)
    changes = plausible_changes(alone, search.solves[0], search.priced)
    kls = [each["kl"][0] for each in found]
    return first_estimate(changes, search.solves, kls), _as_measured(search, search.solves, kls)


def measured(search: Search, assignments: Sequence[Assignment]) -> list[Measured]:
    """Measure assignments whose units are taken from the solutions of a search."""
    used = range(len(search.solves))
    return _as_measured(search, assignments, _measurements(search, used, assignments, {})["kl"])


def assembled(search: Search, chosen: Assignment) -> SolvedLayers:
    """Put the units of several solutions into one folder, as links to their files."""
    run = search.run
    sources = by_module(numbers_of(chosen, search.solves), search.module_groups)
    key = stage_key("assembly", solves=[str(solved.key) for solved in search.solved], sources=sources)
    modules = [
        module
        for number, solved in enumerate(search.solved)
        for module in solved.result.modules
        if sources.get(module.module) == number
    ]
    if not run.options.resume:
        run.store.forget(key)
    found = run.store.find(key)
    if found is None:
        with run.store.staging(key) as staged:
            for module, number in sources.items():
                name = f"{module}.safetensors"
                link_or_copy(search.solved[number].directory / name, staged / name)
            found = run.store.keep(key, staged, {}, subject=run.recipe.variant_id, cache=False)
    return SolvedLayers(found.directory, QuantizeResult.of(0.0, _in_order(modules)), key)


def _as_measured(search: Search, assignments: Sequence[Assignment], kls: Sequence[float]) -> list[Measured]:
    return [
        Measured(one, bytes_of(one, search.priced) + search.kept_bytes, kl)
        for one, kl in zip(assignments, kls, strict=True)
    ]


def _measurements(
    search: Search, used: Sequence[int], assignments: Sequence[Assignment], units: Mapping[str, Any]
) -> dict[str, Any]:
    """Let the child measure with the solutions `used`, or read what an equal run has kept."""
    run, base = search.run, search.run.recipe.base
    solves = [search.solves[number] for number in used]
    asked = {
        "assignments": [by_module(numbers_of(one, solves), search.module_groups) for one in assignments],
        "units": units,
        **search.texts,
    }
    key = _sensitivity_key(search, used, asked)
    if not run.options.resume:
        run.store.forget(key)
    found = run.store.find(key)
    if found is None:
        folders = [str(search.solved[number].directory.resolve()) for number in used]
        job = {"base": str(base.directory.resolve()), "solved": folders, **asked}
        context = run.context
        with context.progress.stage("sensitivity", "measurements") as advance:
            measurements = run_worker(_MODULE, job, folder=context.folder, environ=context.environ, on_progress=advance)
        with run.store.staging(key) as staged:
            found = run.store.keep(key, staged, measurements, subject=run.recipe.variant_id)
    return found.facts


def _sensitivity_key(search: Search, used: Sequence[int], asked: Mapping[str, Any]) -> StageKey:
    return stage_key(
        "sensitivity",
        revision=_REVISION,
        libraries=[metadata.version(name) for name in _LIBRARIES],
        base=search.run.recipe.base.digest,
        solves=[str(search.solved[number].key) for number in used],
        asked=asked,
    )


def _in_order(modules: Sequence[SolvedModule]) -> list[SolvedModule]:
    return sorted(modules, key=lambda module: (module.layer, module.module))
