"""Which solutions of a model a search takes its units from: a few uniform ones, each solved as a whole. Pure."""

from collections.abc import Iterable, Mapping, Sequence

from quantize.mixed_precision.allocation import Options
from quantize.mixed_precision.module_groups import ModuleGroup
from quantize.planning.recipe import Budget
from quantize.schemes.module_config import WeightArgs

Assignment = Mapping[str, WeightArgs]


def solves_for(module_groups: Sequence[ModuleGroup], options: Options, budget: Budget) -> tuple[Assignment, ...]:
    """List the numbers of every unit in each solution; the first is where the search starts.

    `options` price every choice of the units that have more than one, and of the others, in bytes without what is kept.

    - `max_bytes`: the search starts at the finest groups of 4 bits that fit. It may exchange units for 8 bits (where
      the engine has them), which take nearly all that a unit loses away, or for its next finer groups, which take a
      part away for a fraction of the bytes, and make room with next wider ones. Where 8 bits fit everywhere nothing is
      searched.
    - `max_kl`: it starts at 4 bits in the widest groups, and may exchange units for 8 bits (or the finest groups).
    """
    four = _distinct(uniform(module_groups, 4, group_size) for group_size in _sizes(module_groups, 4))
    eight = _distinct(uniform(module_groups, 8, group_size) for group_size in _sizes(module_groups, 8))
    grouped = [one for one in four if one != uniform(module_groups, 4, -1)] or four
    if budget.max_bytes is None:
        return tuple(_distinct([grouped[0], (eight or grouped[::-1])[0]]))
    whole = _fitting(eight, options, budget.max_bytes)
    if whole:
        return (whole[-1],)
    start = (_fitting(grouped, options, budget.max_bytes) or four[:1])[-1]
    return tuple(_distinct([start, *eight[:1], *(shifted(module_groups, start, places) for places in (1, -1))]))


def uniform(module_groups: Sequence[ModuleGroup], bits: int, group_size: int) -> Assignment:
    """Give every unit the widest groups up to `group_size` (-1: all inputs) that it may have at these bits.

    A unit that may have no such groups gets its finest; one without these bits has a single choice, and gets that.
    """
    found: dict[str, WeightArgs] = {}
    for module_group in module_groups:
        same = [choice for choice in module_group.choices if choice.bits == bits] or list(module_group.choices)
        fitting = [choice for choice in same if _width(choice.group_size) <= _width(group_size)]
        found[module_group.name] = (fitting or same[-1:])[0]
    return found


def shifted(module_groups: Sequence[ModuleGroup], assignment: Assignment, places: int) -> Assignment:
    """Give every unit the groups that are so many places finer among those it may have with its bits, or wider below 0.

    A unit that may have no such groups gets its finest, or its widest.
    """
    found: dict[str, WeightArgs] = {}
    for module_group in module_groups:
        own = assignment[module_group.name]
        same = [choice for choice in module_group.choices if choice.bits == own.bits]
        found[module_group.name] = same[min(max(same.index(own) + places, 0), len(same) - 1)]
    return found


def bytes_of(assignment: Assignment, options: Options) -> int:
    """Sum what the units of an assignment weigh."""
    return sum(
        next(option.bytes for option in options[name] if option.weight_args == weight_args)
        for name, weight_args in assignment.items()
    )


def _sizes(module_groups: Sequence[ModuleGroup], bits: int) -> list[int]:
    """List the group sizes that any unit may have at these bits, widest first; none where a choice lacks them."""
    free = [module_group for module_group in module_groups if len(module_group.choices) > 1]
    sizes = {choice.group_size for module_group in free for choice in module_group.choices if choice.bits == bits}
    fixed = {-1} if not free and bits == 4 else set()
    return sorted(sizes | fixed, key=_width, reverse=True)


def _fitting(assignments: Sequence[Assignment], options: Options, max_bytes: int) -> list[Assignment]:
    return [one for one in assignments if bytes_of(one, options) <= max_bytes]


def _distinct(assignments: Iterable[Assignment]) -> list[Assignment]:
    """Drop what says the same as one before."""
    kept: list[Assignment] = []
    for one in assignments:
        if one not in kept:
            kept.append(one)
    return kept


def _width(group_size: int) -> int:
    return 1 << 30 if group_size < 0 else group_size
