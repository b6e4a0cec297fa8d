"""What an assignment will cost, told from what single units add and corrected by what was measured. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from quantize.mixed_precision.allocation import Option, Options
from quantize.mixed_precision.solves import Assignment
from quantize.planning.recipe import Budget
from quantize.schemes.module_config import WeightArgs

# Exchanges add up but for noise and what they have in common: a share beyond these is noise.
_LEAST_FACTOR, _LARGEST_FACTOR = 0.25, 4.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """The divergence of assignments near `start`, which diverges by `start_kl` nats.

    `changes` tell by unit and numbers how much more or less this unit alone adds than with those of `start`. `factors`
    tell by numbers which share of the sum of these changes all exchanges together make.
    """

    start: Assignment
    start_kl: float
    changes: Mapping[str, Mapping[WeightArgs, float]]
    factors: Mapping[WeightArgs, float] = field(default_factory=dict)

    def changed_by(self, unit: str, weight_args: WeightArgs) -> float:
        """Estimate by how much the divergence changes with other numbers for one unit."""
        if weight_args == self.start[unit]:
            return 0.0
        return self.factors.get(weight_args, 1.0) * self.changes[unit][weight_args]

    def predicted(self, assignment: Assignment) -> float:
        """Estimate the divergence of an assignment."""
        return self.start_kl + sum(self.changed_by(unit, weight_args) for unit, weight_args in assignment.items())

    def options(self, priced: Options) -> dict[str, list[Option]]:
        """Put a price in divergence on those options that can be had; it is below zero where something is gained."""
        return {
            unit: [
                replace(option, kl=self.changed_by(unit, option.weight_args))
                for option in every
                if option.weight_args == self.start[unit] or option.weight_args in self.changes.get(unit, {})
            ]
            for unit, every in priced.items()
        }


def alone_of(
    units: Mapping[str, float],
    kinds: Sequence[Mapping[str, float]],
    kind_of: Mapping[str, str],
    solves: Sequence[Assignment],
) -> dict[str, dict[WeightArgs, float]]:
    """Estimate what each unit alone adds with the numbers of each of `solves`.

    `units` tell what it adds with those of the first. `kinds` tell of each of `solves` what all units of a kind add
    together: a unit's share with other numbers is taken to change as its kind's does. Measured for each unit, that
    change was noise, of which an allocation chooses the most favourable.
    """
    found: dict[str, dict[WeightArgs, float]] = {unit: {} for unit in units}
    for solve, added in zip(solves, kinds, strict=True):
        for unit, first in units.items():
            kind = kind_of[unit]
            share = added[kind] / kinds[0][kind] if kinds[0][kind] else 1.0
            found[unit].setdefault(solve[unit], first * share)
    return found


def plausible_changes(
    alone: Mapping[str, Mapping[WeightArgs, float]], start: Assignment, priced: Options
) -> dict[str, dict[WeightArgs, float]]:
    """Turn what each unit adds with these numbers into what other numbers than those of `start` change.

    Larger numbers never count as worse, nor smaller ones as better: that is noise, of which an allocation would choose
    the most favourable.
    """
    found: dict[str, dict[WeightArgs, float]] = {}
    for unit, by_numbers in alone.items():
        sizes = {option.weight_args: option.bytes for option in priced[unit]}
        own, added = sizes[start[unit]], by_numbers[start[unit]]
        found[unit] = {
            weight_args: min(kl - added, 0.0) if sizes[weight_args] > own else max(kl - added, 0.0)
            for weight_args, kl in by_numbers.items()
            if weight_args != start[unit]
        }
    return found


def first_estimate(
    changes: Mapping[str, Mapping[WeightArgs, float]], solves: Sequence[Assignment], kls: Sequence[float]
) -> Estimate:
    """Begin with factors of whole solutions: what exchanging all units changes, as a share of the sum."""
    plain = Estimate(solves[0], kls[0], changes)
    factors: dict[WeightArgs, float] = {}
    for solve, kl in zip(solves[1:], kls[1:], strict=True):
        share = _share(kl - kls[0], plain.predicted(solve) - kls[0])
        factors |= dict.fromkeys(parts_of(solve, solves[0]), share)
    return replace(plain, factors=factors)


def parts_of(assignment: Assignment, start: Assignment) -> dict[WeightArgs, Assignment]:
    """Split an assignment by numbers: the start with only those exchanges that are for the same numbers."""
    numbers = dict.fromkeys(given for unit, given in assignment.items() if given != start[unit])
    return {
        wanted: {unit: given if given == wanted else start[unit] for unit, given in assignment.items()}
        for wanted in numbers
    }


def corrected(estimate: Estimate, assignment: Assignment, parts: Mapping[WeightArgs, float]) -> Estimate:
    """Correct the factors by what the parts of an assignment (`parts_of`) were measured to be.

    Where they are within their range, `predicted` gives of every part what was measured.
    """
    plain = replace(estimate, factors={})
    measured = {
        numbers: _share(parts[numbers] - estimate.start_kl, plain.predicted(part) - estimate.start_kl)
        for numbers, part in parts_of(assignment, estimate.start).items()
    }
    return replace(estimate, factors={**estimate.factors, **measured})


@dataclass(frozen=True, slots=True)
class Measured:
    """An assignment with the bytes of its variant and the divergence that was measured."""

    assignment: Assignment
    bytes: int
    kl: float


def aimed(estimate: Estimate, measured: Sequence[Measured], budget: Budget) -> Budget:
    """Restate a budget for the sum of the options' prices; only a `max_kl` changes.

    What is predicted where `max_kl` is met lies on a line between two measurements: of those that meet it the one that
    is predicted worst, and the next one that doesn't. Each further measurement halves that range or so.
    """
    if budget.max_kl is None:
        return budget
    points = [(estimate.predicted(one.assignment), one.kl) for one in measured]
    meeting = max(point for point in points if point[1] <= budget.max_kl)
    missing = min((point for point in points if point[1] > budget.max_kl and point > meeting), default=None)
    target = meeting[0]
    if missing is not None:
        target += (missing[0] - meeting[0]) * (budget.max_kl - meeting[1]) / (missing[1] - meeting[1])
    return replace(budget, max_kl=target - estimate.start_kl)


def restated(budget: Budget, without_kl: float, whole_kl: float) -> Budget:
    """Restate a `max_kl` for mixtures of solutions without GPTAQ, whose KL is higher than that of an equal whole.

    The ratio is that of one assignment, `without_kl` as a mixture and `whole_kl` solved as a whole.
    """
    if budget.max_kl is None or not whole_kl > 0:
        return budget
    return replace(budget, max_kl=budget.max_kl * without_kl / whole_kl)


def best_of(measured: Sequence[Measured], budget: Budget) -> Measured | None:
    """Choose the least KL within `max_bytes`, or the fewest bytes within `max_kl`; None if nothing meets the budget."""
    if budget.max_kl is not None:
        meeting = [one for one in measured if one.kl <= budget.max_kl]
        return min(meeting, key=lambda one: (one.bytes, one.kl), default=None)
    within = [one for one in measured if budget.max_bytes is None or one.bytes <= budget.max_bytes]
    return min(within, key=lambda one: (one.kl, one.bytes), default=None)


def _share(measured: float, expected: float) -> float:
    return min(max(measured / expected, _LEAST_FACTOR), _LARGEST_FACTOR) if expected else 1.0
