"""`scheme: auto`: what a search prices, what it reads, and what it tells."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.manifest import Scheme
from config.quantization import grouped
from quantize.errors import RecipeError
from quantize.mixed_precision.auto_scheme import (
    by_module,
    kept_bytes,
    measured_line,
    numbers_of,
    options_of,
    pieces,
    require_met,
    search_texts,
    sensitive_line,
)
from quantize.mixed_precision.estimate import Measured
from quantize.mixed_precision.module_groups import ModuleGroup, module_groups_of
from quantize.planning.recipe import Budget
from quantize.schemes.forecast import predicted_bytes
from quantize.schemes.module_config import WeightArgs
from tests.quantize.shapes import QWQ_32B

SMALL, FINE, LARGE = WeightArgs(4, 128), WeightArgs(4, 32), WeightArgs(8, -1)


def sample(length: int, generated_from: int = 0, **more: Any) -> dict[str, Any]:
    """A token sample: a prompt, and what the model said."""
    return {"ids": list(range(length)), "reasoning": [], "answer": (generated_from, length)} | more


@pytest.mark.parametrize(
    "samples,most_tokens,expected",
    [
        ([sample(400, 50)] * 9, 200, [(113, 49), (113, 49), (113, 49), (57, 49)]),
        ([sample(400, 200)] * 2, 128, [(128, 64), (128, 64)]),
        ([sample(400, 50)], 300, [(349, 49)]),
        ([sample(80, 50), sample(400, 50, reasoning=[(20, 40)])], 100, [(80, 49), (83, 19)]),
        ([sample(70, 50, is_text=True)] * 2, 140, [(70, 0), (70, 0)]),
        ([sample(40, 40)] * 2, 80, [(40, 0), (40, 0)]),
        ([sample(40, 39)] * 2, 80, [(40, 38), (40, 38)]),
        ([], 300, []),
    ],
)
def test_generated_text_is_scored(
    samples: Sequence[Mapping[str, Any]], most_tokens: int, expected: Sequence[tuple[int, int]]
) -> None:
    """From the token before the first generated one on; longer pieces where samples are few; a context has an end."""
    found = pieces(samples, most_tokens, 64)
    assert [(len(piece["ids"]), piece["first"]) for piece in found] == expected


@pytest.mark.parametrize(
    "count,short,whole",
    [(36, 24, range(24, 36)), (17, 11, range(11, 17)), (3, 2, [2]), (2, 2, [0, 1]), (1, 1, [0])],
)
def test_units_and_assignments_are_measured_on_different_chats(count: int, short: int, whole: Sequence[int]) -> None:
    """Two thirds of the chats for the one, the others for the other, as far as their tokens are wanted."""
    samples = [sample(400, 50, ids=[number] * 400) for number in range(count)]
    found = search_texts(samples)
    assert [piece["ids"][0] for piece in found["short"]] == [*range(short)]
    assert [piece["ids"][0] for piece in found["whole"]] == [*whole]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), max_size=12), most_tokens=st.integers(1, 900)
)
def test_pieces_score_no_more_than_was_asked_for(lengths: list[tuple[int, int]], most_tokens: int) -> None:
    """Each is the beginning of its sample, and scores one position or more."""
    samples = [sample(length, min(start, length)) for length, start in lengths]
    found = pieces(samples, most_tokens, 64)
    assert sum(len(piece["ids"]) - piece["first"] for piece in found) <= most_tokens
    for piece, whole in zip(found, samples, strict=False):
        assert piece["ids"] == whole["ids"][: len(piece["ids"])]
        assert 0 <= piece["first"] < len(piece["ids"])


@pytest.mark.parametrize("weight_args", [(4, 128), (4, 32), (8, 64), (8, -1)])
def test_options_and_what_is_kept_are_the_forecast(weight_args: tuple[int, int]) -> None:
    """The same numbers everywhere weigh what the forecast says."""
    module_groups = module_groups_of(QWQ_32B.shapes, "cuda")
    chosen = WeightArgs(*weight_args)
    sizes = [
        option.bytes
        for module_group in module_groups
        for option in options_of(module_group, QWQ_32B.shapes)
        if option.weight_args == chosen
    ]
    scheme = Scheme(name="x", compression="gptq", weights=grouped(chosen.bits, chosen.group_size))
    assert sum(sizes) + kept_bytes(QWQ_32B, module_groups) == predicted_bytes(QWQ_32B, scheme)


def test_what_was_measured_is_told() -> None:
    """One line each."""
    changes = {name: {LARGE: -place / 100, SMALL: 0.5} for place, name in enumerate("abcdefg")}
    assert sensitive_line(changes) == (
        "auto: KL falls most by exchanging g (0.06 at 8 bits, group -1), f (0.05 at 8 bits, group -1), "
        "e (0.04 at 8 bits, group -1), d (0.03 at 8 bits, group -1), c (0.02 at 8 bits, group -1)"
    )
    assert sensitive_line({"a": {SMALL: 0.1}}) == "auto: no unit gains from larger numbers"
    measured = Measured({"a": SMALL, "b": LARGE, "c": SMALL}, 12_345_678, 0.04567)
    told = "auto: 2 of 4 bits, group 128; 1 of 8 bits, group -1: 12.3 MB, KL 0.0457"
    assert measured_line(measured) == told
    assert measured_line(measured, 0.05) == f"{told}, 0.05 expected"


MEASURED = [Measured({}, 9_000_000, 0.5), Measured({}, 14_100_000, 0.003)]


def test_a_divergence_out_of_reach_is_told_with_what_is_missing() -> None:
    """By how much the best one misses, and a budget that is met."""
    problem = (
        r"max_kl 0.001: missed by 0.002: the best variant that loads, of 14.1 MB, diverges by 0.003 on calibration "
        r"text; pass --max-kl 0.00301, or keep some modules; what is solved is kept"
    )
    with pytest.raises(RecipeError, match=problem):
        require_met(MEASURED, Budget(max_kl=0.001))
    assert require_met(MEASURED, Budget(max_kl=0.00301)) == MEASURED[1]


@given(kl=st.floats(1e-9, 10))
def test_the_budget_that_an_error_names_is_met(kl: float) -> None:
    """It is rounded up."""
    with pytest.raises(RecipeError) as too_good:
        require_met([Measured({}, 1, kl)], Budget(max_kl=0.0))
    named = float(too_good.value.args[0].split("--max-kl ")[1].split(",")[0])
    assert require_met([Measured({}, 1, kl)], Budget(max_kl=named)).kl == kl


def test_units_are_found_in_solutions_and_spelled_out() -> None:
    """The first solution with a unit's numbers gives it, for all modules of the unit."""
    module_groups = [
        ModuleGroup("qkv", ("q", "k", "v"), (SMALL, LARGE)),
        ModuleGroup("o", ("o",), (SMALL, FINE, LARGE)),
    ]
    solves = [{"qkv": SMALL, "o": SMALL}, {"qkv": LARGE, "o": SMALL}, {"qkv": LARGE, "o": LARGE}]
    numbers = numbers_of({"qkv": LARGE, "o": SMALL}, solves)
    assert numbers == {"qkv": 1, "o": 0}
    assert by_module(numbers, module_groups) == {"q": 1, "k": 1, "v": 1, "o": 0}
