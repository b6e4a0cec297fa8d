"""Stage 2 of `scheme: auto`: a few uniform solutions -> the mixture of them that meets a budget, in a closed loop.

Each solution is an ordinary `solve` stage. What single exchanges of units change is
measured once with the solved integers. Then an assignment is chosen, measured as a whole, and the estimate corrected,
until the choice stays or four rounds are over; the best of what was measured is the variant.

With GPTAQ, a layer makes up for the errors of the layers before it in its own solution, and not for those of another
one: units of such solutions can't be exchanged. The solutions of the search are without it; what was found is solved as
a whole with it, and taken if it is better.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from quantize.backends.losses import SolvedModule
from quantize.backends.protocol import QuantizeResult
from quantize.mixed_precision.allocation import Options, allocate
from quantize.mixed_precision.auto_scheme import (
    by_module,
    kept_bytes,
    measured_line,
    numbers_of,
    options_of,
    require_met,
    search_texts,
    sensitive_line,
)
from quantize.mixed_precision.estimate import (
    Estimate,
    Measured,
    aimed,
    corrected,
    first_estimate,
    parts_of,
    plausible_changes,
)
from quantize.mixed_precision.module_groups import ModuleGroup, module_groups_of, written
from quantize.mixed_precision.solves import Assignment, bytes_of, solves_for
from quantize.planning.recipe import Budget
from quantize.running.files import link_or_copy
from quantize.running.stage_store import StageKey, stage_key
from quantize.running.worker import run_worker
from quantize.schemes.fit import heads_of
from quantize.schemes.module_config import WeightArgs
from quantize.schemes.scheme import named
from quantize.schemes.settings import SolverSettings, without_gptaq
from quantize.stages.solve import SolvedLayers, solve
from quantize.stages.tokens import Tokens
from quantize.stages.variant_run import VariantRun

_ROUNDS = 4
_MODULE = "quantize.mixed_precision.sensitivity"
_LIBRARIES = ("torch", "transformers")
# Raise this when the same job would be measured otherwise.
_REVISION = 3


@dataclass(frozen=True, slots=True)
class Search:
    """What all rounds share: units with their prices in bytes, and solutions of the whole model."""

    run: VariantRun
    module_groups: tuple[ModuleGroup, ...]
    priced: Options
    kept_bytes: int
    solves: tuple[Assignment, ...]
    solved: tuple[SolvedLayers, ...]
    texts: Mapping[str, Sequence[Mapping[str, Any]]]


def solve_or_search(run: VariantRun, tokens: Tokens) -> tuple[VariantRun, SolvedLayers]:
    """Solve a recipe's scheme; for one with a budget, find the scheme first, and put its solution together.

    RecipeError: nothing meets the budget; it names the nearest one that is met.
    """
    if run.recipe.budget is None:
        return run, solve(run, tokens)
    search = _begun(run, tokens, run.recipe.budget)
    chosen, solved = _searched(search, tokens, run.recipe.budget)
    scheme = written(search.module_groups, chosen, list(run.recipe.base.shapes))
    return replace(run, recipe=replace(run.recipe, scheme=scheme)), solved


def _begun(run: VariantRun, tokens: Tokens, budget: Budget) -> Search:
    """Solve what the search chooses from; a size that can't be reached is known before."""
    base, options = run.recipe.base, run.options
    module_groups = module_groups_of(
        base.shapes, options.engine, budget.overrides, tensor_parallel=options.tensor_parallel, heads=heads_of(base)
    )
    priced = {group.name: options_of(group, base.shapes) for group in module_groups}
    kept = kept_bytes(base, module_groups)
    allocate(priced, budget, kept)
    free = budget if budget.max_bytes is None else replace(budget, max_bytes=budget.max_bytes - kept)
    solves = solves_for(module_groups, priced, free)
    samples = tokens.samples.spare or tokens.samples.calibration
    search = Search(run, module_groups, priced, kept, (), (), search_texts(samples))
    settings = without_gptaq(run.recipe.settings) if len(solves) > 1 else run.recipe.settings
    for number, assignment in enumerate(solves, 1):
        search = _with_solution(search, tokens, assignment, settings, f"solution {number} of {len(solves)}")
    return search


def _with_solution(
    search: Search, tokens: Tokens, assignment: Assignment, settings: SolverSettings, called: str
) -> Search:
    """Solve an assignment as a scheme of its own."""
    run = search.run
    scheme = named(written(search.module_groups, assignment, list(run.recipe.base.shapes)))
    run.context.progress.log(f"auto: {called}: {scheme.name}")
    recipe = replace(run.recipe, scheme=scheme, settings=settings, budget=None)
    solved = solve(replace(run, recipe=recipe), tokens)
    return replace(search, solves=(*search.solves, assignment), solved=(*search.solved, solved))


def _searched(search: Search, tokens: Tokens, budget: Budget) -> tuple[Assignment, SolvedLayers]:
    """Choose, measure and correct, a few times; RecipeError if nothing that was measured meets the budget."""
    log = search.run.context.progress.log
    if len(search.solves) == 1:
        return search.solves[0], _assembled(search, search.solves[0])
    estimate, measured = _first_look(search)
    for line in (sensitive_line(estimate.changes), *map(measured_line, measured)):
        log(line)
    require_met(measured, budget)
    for _ in range(_ROUNDS):
        options = estimate.options(search.priced)
        chosen = allocate(options, aimed(estimate, measured, budget), search.kept_bytes).weight_args
        if any(one.assignment == chosen for one in measured):
            break
        parts = parts_of(chosen, estimate.start) if budget.max_kl is None else {}
        tried = _measured(search, [chosen, *(parts.values() if len(parts) > 1 else ())])
        log(measured_line(tried[0], estimate.predicted(chosen) if budget.max_kl is None else None))
        if parts:
            kls = [one.kl for one in tried[1:] or tried]
            estimate = corrected(estimate, chosen, dict(zip(parts, kls, strict=True)))
        measured += tried
    best = require_met(measured, budget)
    # At a given size the uniform start, too: the result must not be worse than that variant.
    wanted = [best.assignment] if budget.max_bytes is None else [best.assignment, search.solves[0]]
    wholes = _solved_as_wholes(search, tokens, [one for n, one in enumerate(wanted) if one not in wanted[:n]])
    least = min(wholes, key=lambda one: one[0].kl)
    met, solved = least if least[0].kl < best.kl else (best, _assembled(search, best.assignment))
    log(measured_line(met))
    return met.assignment, solved


def _solved_as_wholes(
    search: Search, tokens: Tokens, assignments: Sequence[Assignment]
) -> list[tuple[Measured, SolvedLayers]]:
    """Solve assignments with all that the recipe's solver has, and measure them."""
    for number, assignment in enumerate(assignments, 1):
        called = f"as a whole, {number} of {len(assignments)}"
        search = _with_solution(search, tokens, assignment, search.run.recipe.settings, called)
    used = range(len(search.solves) - len(assignments), len(search.solves))
    seconds = round(sum(one.result.seconds for one in search.solved), 1)
    found = []
    for number, assignment in zip(used, assignments, strict=True):
        kl = _measurements(search, [number], [assignment], {})["kl"][0]
        measured = Measured(assignment, bytes_of(assignment, search.priced) + search.kept_bytes, kl)
        search.run.context.progress.log(measured_line(measured))
        solved = search.solved[number]
        parts = tuple(one.key for one in search.solved if one.key != solved.key)
        found.append((measured, replace(solved, result=replace(solved.result, seconds=seconds), parts=parts)))
    return found


def _first_look(search: Search) -> tuple[Estimate, list[Measured]]:
    """Measure all solutions, and what exchanging single units of the first one for those of the others changes."""
    start = search.solves[0]
    kls: list[float] = []
    changes: dict[str, dict[WeightArgs, float]] = {group.name: {} for group in search.module_groups}
    for number, other in enumerate(search.solves[1:], 1):
        exchanged = [group for group in search.module_groups if _is_first(group.name, number, search.solves)]
        units = {group.name: {"modules": group.modules, "solves": [1]} for group in exchanged}
        found = _measurements(search, (0, number), [start, other], units)
        kls = [*(kls or found["kl"][:1]), found["kl"][1]]
        alone = {unit: {other[unit]: found["units"][unit][0]} for unit in units}
        for unit, change in plausible_changes(alone, start, found["short_kl"], search.priced).items():
            changes[unit] |= change
    return first_estimate(changes, search.solves, kls), _as_measured(search, search.solves, kls)


def _is_first(unit: str, number: int, solves: Sequence[Assignment]) -> bool:
    return all(solve[unit] != solves[number][unit] for solve in solves[:number])


def _measured(search: Search, assignments: Sequence[Assignment]) -> list[Measured]:
    used = range(len(search.solves))
    return _as_measured(search, assignments, _measurements(search, used, assignments, {})["kl"])


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


def _assembled(search: Search, chosen: Assignment) -> SolvedLayers:
    """Put the units of several solutions into one folder, as links to their files."""
    run = search.run
    sources = by_module(numbers_of(chosen, search.solves), search.module_groups)
    parts = tuple(solved.key for solved in search.solved)
    key = stage_key("assembly", solves=[str(part) for part in parts], sources=sources)
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
    seconds = round(sum(solved.result.seconds for solved in search.solved), 1)
    return SolvedLayers(found.directory, QuantizeResult.of(seconds, _in_order(modules)), key, parts)


def _in_order(modules: Sequence[SolvedModule]) -> list[SolvedModule]:
    return sorted(modules, key=lambda module: (module.layer, module.module))
