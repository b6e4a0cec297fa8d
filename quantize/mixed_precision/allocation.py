"""Which numbers each unit of a model gets under a budget: the front of all trades of bytes for divergence. Pure.

The front is built unit by unit and doesn't depend on the budget, so a larger budget never gives a worse allocation.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from quantize.errors import RecipeError
from quantize.planning.recipe import Budget
from quantize.schemes.module_config import WeightArgs

# Points of the front that are kept beside its corners; with fewer than these the front is exact.
MOST_POINTS = 1000


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a unit: its numbers, its bytes, and the mean KL in nats that it adds, below zero if it saves."""

    weight_args: WeightArgs
    bytes: int
    kl: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """The numbers of every unit, with the bytes and the expected KL of the whole model."""

    weight_args: Mapping[str, WeightArgs]
    bytes: int
    kl: float


@dataclass(frozen=True, slots=True, eq=False)
class PartialAllocation:
    """A choice for some first units of a model: the sums so far, the last unit's option and the choice before it."""

    bytes: int
    kl: float
    option: Option | None = None
    before: "PartialAllocation | None" = None


Options = Mapping[str, Sequence[Option]]


def allocate(options: Options, budget: Budget, kept_bytes: int = 0) -> Allocation:
    """Choose an option per unit: least KL within `max_bytes`, or fewest bytes within `max_kl`, or else the least KL.

    `kept_bytes` are those of all tensors that belong to no unit. RecipeError: a `max_bytes` that nothing meets; it
    names the nearest one that is met.
    """
    front = trade_offs(options.values())
    if budget.max_bytes is not None:
        place = bisect_right(front, budget.max_bytes - kept_bytes, key=lambda point: point.bytes) - 1
        if place < 0:
            raise RecipeError(
                f"max_bytes {megabytes(budget.max_bytes)}: the smallest variant that loads has "
                f"{megabytes(front[0].bytes + kept_bytes)}; raise the budget"
            )
        return _allocation(options, front[place], kept_bytes)
    assert budget.max_kl is not None
    found = next((point for point in front if point.kl <= budget.max_kl), front[-1])
    return _allocation(options, found, kept_bytes)


def trade_offs(module_groups: Iterable[Sequence[Option]], most_points: int = MOST_POINTS) -> list[PartialAllocation]:
    """List choices that no other beats in both bytes and KL, smallest first, so best last.

    Where there are more than `most_points`, the corners of the lower convex hull always stay, and between them the
    best of each of `most_points` equal ranges of bytes. For any budget the KL is thus above the least possible one by
    less than what the step to the next corner would save.
    """
    front = [PartialAllocation(0, 0.0)]
    for module_group in module_groups:
        sums = sorted(
            (point.bytes + option.bytes, point.kl + option.kl, *places)
            for places in product(range(len(front)), range(len(module_group)))
            for point, option in [(front[places[0]], module_group[places[1]])]
        )
        front = [
            PartialAllocation(size, kl, module_group[option], front[before])
            for size, kl, before, option in _thinned(_undominated(sums), most_points)
        ]
    return front


_Sum = tuple[int, float, int, int]  # bytes, KL, place of the point before, place of the option


def _undominated(sums: Sequence[_Sum]) -> list[_Sum]:
    kept: list[_Sum] = []
    for total in sums:
        if not kept or total[1] < kept[-1][1]:
            kept.append(total)
    return kept


def _thinned(front: list[_Sum], most_points: int) -> list[_Sum]:
    if len(front) <= most_points:
        return front
    least, width = front[0][0], (front[-1][0] - front[0][0]) / most_points
    # KL falls along the front: of each range, the last is the best.
    best = {int((one[0] - least) / width): one for one in front}
    return sorted({*best.values(), *_corners(front)})


def _corners(front: Sequence[_Sum]) -> list[_Sum]:
    """The lower convex hull, by Andrew's monotone chain."""
    hull: list[_Sum] = []
    for one in front:
        while len(hull) > 1 and not _turns_up(hull[-2], hull[-1], one):
            hull.pop()
        hull.append(one)
    return hull


def _turns_up(first: _Sum, middle: _Sum, last: _Sum) -> bool:
    return (middle[0] - first[0]) * (last[1] - middle[1]) > (last[0] - middle[0]) * (middle[1] - first[1])


def _allocation(options: Options, point: PartialAllocation, kept_bytes: int) -> Allocation:
    weight_args: dict[str, WeightArgs] = {}
    at: PartialAllocation | None = point
    for name in reversed(list(options)):
        assert at is not None
        assert at.option is not None
        weight_args[name], at = at.option.weight_args, at.before
    return Allocation({name: weight_args[name] for name in options}, point.bytes + kept_bytes, point.kl)


def megabytes(count_bytes: int) -> str:
    """Write bytes in tenths of a MB, never fewer than they are: a budget of that number is met."""
    return f"{-(-count_bytes // 100_000) / 10:.1f} MB"
