"""`scheme: auto`: what a search prices, on which text it measures, and what its log says. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from quantize.base import BaseModel
from quantize.errors import RecipeError
from quantize.mixed_precision.allocation import Option, megabytes
from quantize.mixed_precision.estimate import Measured, best_of
from quantize.mixed_precision.module_groups import ModuleGroup, uniform_scheme
from quantize.mixed_precision.solves import Assignment
from quantize.planning.recipe import Budget
from quantize.schemes.forecast import packed_bytes
from quantize.schemes.module_config import WeightArgs

# So many generated tokens tell units apart, if they come from many chats: a few tokens have most of a KL. Every unit is
# measured on them, with a little of their prompts.
_SHORT_TOKENS, _SHORT_CONTEXT = 1536, 32
# On these, whole assignments are measured.
_WHOLE_TOKENS, _WHOLE_CONTEXT = 1024, 160
_PIECE_TOKENS = 64
_NAMED = 5


def options_of(
    module_group: ModuleGroup, shapes: Mapping[str, tuple[int, int]], *, zero_points: bool = False
) -> list[Option]:
    """Price each choice of a unit in bytes."""
    return [
        Option(weight_args, _bytes_of(module_group, shapes, weight_args, zero_points=zero_points), 0.0)
        for weight_args in module_group.choices
    ]


def kept_bytes(base: BaseModel, module_groups: Sequence[ModuleGroup]) -> int:
    """Bytes of all tensors that no choice changes."""
    modules = {module for module_group in module_groups for module in module_group.modules}
    searched = {tensor for tensor, stored in base.modules.stored_in.items() if modules.intersection(stored)}
    return sum(tensor.bytes for name, tensor in base.tensors.items() if name not in searched)


def search_texts(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Give the `short` text for single units and the `whole` one for assignments, of different samples.

    What was chosen for its luck on the one doesn't have it on the other. Fewer than three samples are read for both.
    """
    most = 2 * len(samples) // 3 if len(samples) > 2 else 0
    return {
        "short": pieces(samples[:most] or samples, _SHORT_TOKENS, _SHORT_CONTEXT),
        "whole": pieces(samples[most:], _WHOLE_TOKENS, _WHOLE_CONTEXT),
    }


def pieces(samples: Sequence[Mapping[str, Any]], most_tokens: int, most_context: int) -> list[dict[str, Any]]:
    """Take the beginnings of samples in order: ids, and the `first` position that is scored.

    Scored are, where possible, tokens that the model generates: 64 of each sample, `most_tokens` together, and more of
    each where samples are few. Before them stand up to `most_context` tokens of the prompt.
    """
    scored = max(_PIECE_TOKENS, -(-most_tokens // max(len(samples), 1)))
    taken: list[dict[str, Any]] = []
    left = most_tokens
    for sample in samples:
        if left < 1:
            break
        # A position is scored for the token that it says comes next.
        first = min(max(_generated_from(sample) - 1, 0), most_context, len(sample["ids"]) - 1)
        ids = list(sample["ids"][: first + min(scored, left)])
        taken.append({"ids": ids, "first": first})
        left -= len(ids) - first
    return taken


def require_met(measured: Sequence[Measured], budget: Budget) -> Measured:
    """Give the best of what was measured; RecipeError, by how much the best one that there is misses a `max_kl`."""
    best = best_of(measured, budget)
    if best is not None:
        return best
    assert budget.max_kl is not None
    least = min(measured, key=lambda one: one.kl)
    raise RecipeError(
        f"max_kl {budget.max_kl:g}: missed by {least.kl - budget.max_kl:.2g}: the best variant that loads, of "
        f"{megabytes(least.bytes)}, diverges by {least.kl:.3g} on calibration text; pass --max-kl {_raised(least.kl)}, "
        "or keep some modules; what is solved is kept"
    )


def sensitive_line(changes: Mapping[str, Mapping[WeightArgs, float]]) -> str:
    """Name the units that gain most from larger numbers."""
    gains = {(unit, numbers): -change for unit, each in changes.items() for numbers, change in each.items()}
    most = sorted((one for one in gains if gains[one] > 0), key=lambda one: -gains[one])[:_NAMED]
    gained = ", ".join(f"{unit} ({gains[unit, numbers]:.2g} at {_words(numbers)})" for unit, numbers in most)
    return f"auto: KL falls most by exchanging {gained}" if most else "auto: no unit gains from larger numbers"


def measured_line(measured: Measured, expected: float | None = None) -> str:
    """Tell an assignment with what was measured, in one line."""
    counts: dict[str, int] = {}
    for weight_args in measured.assignment.values():
        counts[_words(weight_args)] = counts.get(_words(weight_args), 0) + 1
    text = "; ".join(f"{count} of {words}" for words, count in sorted(counts.items()))
    expectation = "" if expected is None else f", {expected:.3g} expected"
    return f"auto: {text}: {measured.bytes / 1e6:.1f} MB, KL {measured.kl:.3g}{expectation}"


def by_module(assignment: Mapping[str, int], module_groups: Sequence[ModuleGroup]) -> dict[str, int]:
    """Spell the numbers of units' solutions out for their modules."""
    return {module: assignment[group.name] for group in module_groups for module in group.modules}


def numbers_of(assignment: Assignment, solves: Sequence[Assignment]) -> dict[str, int]:
    """Tell for every unit which solution, the first of several, has it as the assignment wants it."""
    return {
        unit: next(number for number, solve in enumerate(solves) if solve[unit] == weight_args)
        for unit, weight_args in assignment.items()
    }


def _bytes_of(
    module_group: ModuleGroup, shapes: Mapping[str, tuple[int, int]], weight_args: WeightArgs, *, zero_points: bool
) -> int:
    scheme = uniform_scheme(weight_args, zero_points=zero_points)
    parts = (
        packed_bytes(module, shapes[module], weight_args, scheme.compression, scheme.weights)
        for module in module_group.modules
    )
    return sum(sum(sizes.values()) for sizes in parts)


def _generated_from(sample: Mapping[str, Any]) -> int:
    """Find the first token that the model would generate; 0 where the text has no turns."""
    reasoning, answer = sample.get("reasoning") or (), sample.get("answer") or (0, 0)
    starts = [*(span[0] for span in reasoning), *([answer[0]] if answer[1] > answer[0] else [])]
    return 0 if sample.get("is_text") else int(min(starts, default=0))


def _words(weight_args: WeightArgs) -> str:
    return f"{weight_args.bits} bits, group {weight_args.group_size}"


def _raised(kl: float) -> str:
    """Write a KL with three digits, never less than it is: a budget of that number is met."""
    return f"{kl * 1.005:.3g}"
