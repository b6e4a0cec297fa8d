"""Stage 2 of `scheme: auto`: a few uniform solutions -> the mixture of them that meets a budget, in a closed loop.

Each solution is an ordinary `solve` stage. What each unit alone adds to the parent is measured once, with the solved
integers. Then an assignment is chosen, measured as a whole, and the estimate corrected, until the choice stays or four
rounds are over.

With GPTAQ, a layer makes up for the errors of the layers before it in its own solution, and not for those of another
one: units of such solutions can't be exchanged. So the solutions of the search are without it, and what was found is
solved as a whole with it. The KL of the two differs: a `max_kl` is restated for the search by the ratio of the two,
which is known of the start, and then of each assignment that was solved as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantize.mixed_precision.allocation import allocate
from quantize.mixed_precision.auto_scheme import measured_line, require_met, sensitive_line
from quantize.mixed_precision.estimate import (
    Estimate,
    Measured,
    aimed,
    best_of,
    corrected,
    parts_of,
    restated,
)
from quantize.mixed_precision.solves import Assignment, solves_for
from quantize.planning.recipe import Budget
from quantize.schemes.settings import without_gptaq
from quantize.stages.solutions import (
    Search,
    Solution,
    assembled,
    first_look,
    measured,
    scheme_of,
    search_of,
    solved_as_whole,
    with_solution,
)
from quantize.stages.solve import SolvedLayers, solve
from quantize.stages.tokens import Tokens
from quantize.stages.variant_run import VariantRun

_ROUNDS = 4
# Assignments that are solved as wholes for a `max_kl`, beside the start. One this near to it is near enough.
_WHOLES, _NEAR = 3, 0.9


@dataclass(frozen=True, slots=True)
class Findings:
    """What a search has measured of mixtures, and what it expects of others."""

    estimate: Estimate
    measured: tuple[Measured, ...]


def solve_or_search(run: VariantRun, tokens: Tokens) -> tuple[VariantRun, SolvedLayers]:
    """Solve a recipe's scheme; for one with a budget, find the scheme first, and put its solution together.

    RecipeError: nothing meets the budget; it names the nearest one that is met.
    """
    budget = run.recipe.budget
    if budget is None:
        return run, solve(run, tokens)
    search = search_of(run, tokens, budget)
    allocate(search.priced, budget, search.kept_bytes)  # a size out of reach is known before anything is solved
    chosen, solved = _within_bytes(search) if budget.max_kl is None else _within_kl(search)
    return replace(run, recipe=replace(run.recipe, scheme=scheme_of(search, chosen))), solved


def _within_bytes(search: Search) -> tuple[Assignment, SolvedLayers]:
    """Find what diverges least: the best mixture of the search, that one solved as a whole, or the uniform start."""
    budget = search.budget
    assert budget.max_bytes is not None
    inner = replace(budget, max_bytes=budget.max_bytes - search.kept_bytes)
    assignments = solves_for(search.module_groups, search.priced, inner)
    start = assignments[0]
    if len(assignments) == 1:
        alone = with_solution(search, start, search.run.recipe.settings, "the only solution")
        return start, alone.solved[0]
    search = _with_solutions(search, assignments)
    best = require_met(_searched(search, _first_findings(search), budget).measured, budget)
    wanted = [best.assignment] if best.assignment == start else [best.assignment, start]
    wholes = [
        solved_as_whole(search, one, f"as a whole, {number} of {len(wanted)}") for number, one in enumerate(wanted, 1)
    ]
    return _chosen(search, wholes, [best])


def _within_kl(search: Search) -> tuple[Assignment, SolvedLayers]:
    """Find the smallest variant that meets a `max_kl`, of mixtures, and of assignments that are solved as wholes."""
    budget = search.budget
    assert budget.max_kl is not None
    assignments = solves_for(search.module_groups, search.priced, budget)
    wholes = [solved_as_whole(search, assignments[0], "as a whole")]
    if wholes[0].measured.kl <= budget.max_kl or len(assignments) == 1:
        return _chosen(search, wholes, [])
    search = _with_solutions(search, assignments)
    findings = _first_findings(search)
    without_kl = findings.measured[0].kl
    for number in range(1, _WHOLES + 1):
        inner = restated(budget, without_kl, wholes[-1].measured.kl)
        findings = _searched(search, findings, inner)
        best = best_of(findings.measured, inner) or min(findings.measured, key=lambda one: one.kl)
        if any(whole.measured.assignment == best.assignment for whole in wholes):
            break
        wholes.append(solved_as_whole(search, best.assignment, f"as a whole, {number} of up to {_WHOLES}"))
        without_kl = best.kl
        if _NEAR * budget.max_kl <= wholes[-1].measured.kl <= budget.max_kl:
            break
    return _chosen(search, wholes, findings.measured)


def _with_solutions(search: Search, assignments: Sequence[Assignment]) -> Search:
    """Solve what the search takes its units from."""
    settings = without_gptaq(search.run.recipe.settings)
    for number, assignment in enumerate(assignments, 1):
        search = with_solution(search, assignment, settings, f"solution {number} of {len(assignments)}")
    return search


def _first_findings(search: Search) -> Findings:
    estimate, found = first_look(search)
    for line in (sensitive_line(estimate.changes), *map(measured_line, found)):
        search.run.context.progress.log(line)
    return Findings(estimate, tuple(found))


def _searched(search: Search, findings: Findings, budget: Budget) -> Findings:
    """Choose, measure and correct, a few times."""
    for _ in range(_ROUNDS if best_of(findings.measured, budget) else 0):
        estimate = findings.estimate
        inner = aimed(estimate, findings.measured, budget)
        chosen = allocate(estimate.options(search.priced), inner, search.kept_bytes).weight_args
        if any(one.assignment == chosen for one in findings.measured):
            break
        findings = _measured_too(search, findings, chosen, split=budget.max_kl is None)
    return findings


def _measured_too(search: Search, findings: Findings, chosen: Assignment, *, split: bool) -> Findings:
    """Measure an assignment; `split` its parts, too, by which the estimate is corrected."""
    estimate = findings.estimate
    parts = parts_of(chosen, estimate.start) if split else {}
    tried = measured(search, [chosen, *(parts.values() if len(parts) > 1 else ())])
    search.run.context.progress.log(measured_line(tried[0], estimate.predicted(chosen) if split else None))
    if parts:
        kls = [one.kl for one in tried[1:] or tried]
        estimate = corrected(estimate, chosen, dict(zip(parts, kls, strict=True)))
    return Findings(estimate, (*findings.measured, *tried))


def _chosen(
    search: Search, wholes: Sequence[Solution], mixtures: Sequence[Measured]
) -> tuple[Assignment, SolvedLayers]:
    """Take the best of all that was measured, with the seconds and the stages of all that was solved."""
    best = require_met([*(whole.measured for whole in wholes), *mixtures], search.budget)
    search.run.context.progress.log(measured_line(best))
    whole = next((one.solved for one in wholes if one.measured == best), None)
    solved = whole or assembled(search, best.assignment)
    every = [*search.solved, *(one.solved for one in wholes)]
    parts = tuple(dict.fromkeys(one.key for one in every if one.key != solved.key))
    seconds = round(sum(one.result.seconds for one in every), 1)
    return best.assignment, replace(solved, result=replace(solved.result, seconds=seconds), parts=parts)
