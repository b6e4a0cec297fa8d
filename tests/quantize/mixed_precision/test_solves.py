"""Which solutions a search takes its units from: few, each fits its model, and the first meets the size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.manifest import Engine, Override
from quantize.mixed_precision.auto_scheme import options_of
from quantize.mixed_precision.module_groups import module_groups_of
from quantize.mixed_precision.solves import Assignment, bytes_of, solves_for, uniform
from quantize.planning.recipe import Budget
from quantize.schemes.module_config import WeightArgs
from tests.quantize.shapes import qwen2

# 576 = 9 * 64, 1536 = 12 * 128
SMALL = qwen2("small", layers=2, hidden=576, inner=1536, heads=4, kv_heads=2, vocabulary=64)
Numbers = tuple[int, int]


def told(solves: tuple[Assignment, ...]) -> list[set[Numbers]]:
    """The numbers that occur in each solution."""
    return [{(one.bits, one.group_size) for one in solve.values()} for solve in solves]


def found(engine: Engine, max_bytes_of: Numbers | None, more: int = 0) -> list[set[Numbers]]:
    """The solutions for the size of a uniform assignment and some bytes, or for a divergence."""
    groups = module_groups_of(SMALL.shapes, engine)
    options = {group.name: options_of(group, SMALL.shapes) for group in groups}
    size = None if max_bytes_of is None else bytes_of(uniform(groups, *max_bytes_of), options) + more
    budget = Budget(max_kl=0.1) if size is None else Budget(max_bytes=size)
    solves = solves_for(groups, options, budget)
    assert len(solves) <= budget.most_solves
    return told(solves)


CHANNEL, MIXED, G64, G32, INT8 = {(4, -1)}, {(4, 128), (4, 64)}, {(4, 64)}, {(4, 32)}, {(8, -1)}
WIDER, FINER = {(4, -1), (4, 128)}, {(4, 64), (4, 32)}


@pytest.mark.parametrize(
    "engine,size,more,expected",
    [
        ("cuda", None, 0, [MIXED, INT8]),
        ("cpu", None, 0, [MIXED, G32]),
        ("cuda", (4, 64), 0, [G64, INT8, G32, WIDER]),
        ("cuda", (4, 64), -1, [MIXED, INT8, FINER, CHANNEL]),
        ("cuda", (4, -1), 0, [CHANNEL, INT8, MIXED]),
        ("cuda", (4, 32), 99, [G32, INT8, G64]),
        ("cpu", (4, 64), 0, [G64, G32, WIDER]),
        ("cpu", (4, 32), 0, [G32, G64]),
        ("cuda", (8, -1), 0, [INT8]),
        ("cuda", (8, 32), 10**9, [{(8, 32)}]),
    ],
)
def test_solutions_are_those_around_the_budget(
    engine: Engine, size: Numbers | None, more: int, expected: list[set[Numbers]]
) -> None:
    """Where to start, what is better, and what makes room for it; a single one where nothing is to be searched."""
    assert found(engine, size, more) == expected


@given(share=st.floats(0, 1), engine=st.sampled_from(["cpu", "cuda"]))
def test_a_search_starts_within_its_size(share: float, engine: Engine) -> None:
    """All units have numbers that they may have, and the start fits; of different solutions none is solved twice."""
    groups = module_groups_of(SMALL.shapes, engine)
    options = {group.name: options_of(group, SMALL.shapes) for group in groups}
    least, most = (bytes_of(uniform(groups, *numbers), options) for numbers in ((4, -1), (8, 32)))
    budget = Budget(max_bytes=least + int(share * (most - least)))
    solves = solves_for(groups, options, budget)
    assert bytes_of(solves[0], options) <= (budget.max_bytes or 0)
    for solve in solves:
        assert all(solve[group.name] in group.choices for group in groups)
        assert solves.count(solve) == 1


def test_what_an_override_gives_stays_in_every_solution() -> None:
    """A unit with one choice has that one."""
    groups = module_groups_of(SMALL.shapes, "cuda", (Override(modules="*.down_proj", bits=8, group_size=64),))
    options = {group.name: options_of(group, SMALL.shapes) for group in groups}
    solves = solves_for(groups, options, Budget(max_kl=0.1))
    assert len(solves) == 2
    assert {solve["model.layers.0.mlp.down_proj"] for solve in solves} == {WeightArgs(8, 64)}


def test_nothing_to_choose_is_one_solution() -> None:
    """Overrides decide everything."""
    groups = module_groups_of(SMALL.shapes, "cuda", (Override(modules="*", bits=8, group_size=64),))
    options = {group.name: options_of(group, SMALL.shapes) for group in groups}
    for budget in (Budget(max_kl=0.1), Budget(max_bytes=10**9)):
        assert told(solves_for(groups, options, budget)) == [{(8, 64)}]
