"""Which rungs may answer at all."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.manifest import Manifest
from config.schema import NO_FLOOR, AliasSettings, Floor
from config.variant import AT_LEAST, MEASURES, PARENT_QUALITY, QualityMeasures, Variant
from gateway.errors import FloorUnmet
from gateway.routing.target import Catalog, Target
from gateway.routing.target import excluded_rungs, permitted_rungs, unservable_aliases
from tests.config.sealed import QUALITY, manifest_of

HI = Variant("hi", "bf16", PARENT_QUALITY)
MID = Variant("mid", "int8", QualityMeasures("measured", 0.01, 0.97, 1.01, 0.2, 1.05))
LO = Variant("lo", "int4", QualityMeasures("measured", 0.05, 0.92, 1.05))
ODD = Variant("odd", "fp8", QualityMeasures("unknown"))
SAID = Variant("said", "fp8", QualityMeasures("declared", kl_mean=0.001, top1_agreement=0.99))
CHECKS = [
    {"name": "kl_mean", "value": 0.05, "limit": 0.02, "passed": False},
    {"name": "top1_agreement", "value": 0.92, "limit": 0.9, "passed": True},
    {"name": "kl_p99", "value": 2, "limit": 1.5, "passed": False},
]


def manifest(verdict: str, checks: list[dict[str, Any]] | None = None) -> Manifest:
    """A manifest with this verdict."""
    quality = {**QUALITY, "verdict": verdict, "checks": checks or []}
    return Manifest.model_validate({**manifest_of(4), "quality": quality})


PASSED = replace(MID, manifest=manifest("pass"))
FAILED = replace(LO, name="bad", manifest=manifest("fail", CHECKS))
EVERYBODY = {variant.name: variant for variant in (HI, MID, LO, ODD, SAID, FAILED)}


def catalog(*ladder: str, **options: Any) -> Catalog:
    """One alias over some of the variants above."""
    return Catalog({"smol": AliasSettings.model_validate({"ladder": ladder, **options})}, EVERYBODY)


def target(*rungs: Variant, floor: Floor = NO_FLOOR, trust_declared: bool = False) -> Target:
    """What a name stands for."""
    return Target("smol", rungs, floor, False, trust_declared=trust_declared)


def names(variants: tuple[Variant, ...]) -> str:
    """Who they are."""
    return " ".join(variant.name for variant in variants)


@pytest.mark.parametrize(
    "alias_floor, caller_floor, precisions, kept",
    [
        ({}, {}, None, "hi mid lo odd"),
        ({"top1_agreement": 0.95}, {}, None, "hi mid"),
        ({}, {"top1_agreement": 0.95}, None, "hi mid"),
        ({"top1_agreement": 0.95}, {"kl_mean": 0.001}, None, "hi"),
        ({"top1_agreement": 0.99}, {"top1_agreement": 0.5}, None, "hi"),
        ({"perplexity_ratio": 1.01}, {}, None, "hi mid"),
        ({"kl_p99": 0.2}, {}, None, "hi mid"),
        ({}, {"kl_p99": 0.1}, None, "hi"),
        ({}, {"length_ratio": 1.05}, None, "hi mid"),
        ({"length_ratio": 1.04}, {}, None, "hi"),
        ({}, {}, {"int8", "int4"}, "mid lo"),
        ({"top1_agreement": 0.95}, {}, {"int8", "int4"}, "mid"),
        ({}, {}, {"fp8"}, "odd"),
    ],
)
def test_who_may_answer(
    alias_floor: dict[str, float], caller_floor: dict[str, float], precisions: set[str] | None, kept: str
) -> None:
    """A rung stays if it satisfies the alias, the caller's floor and precisions; an unknown quality satisfies none."""
    asked = target(HI, MID, LO, ODD, floor=Floor(**alias_floor))
    wanted = None if precisions is None else frozenset(precisions)
    assert names(permitted_rungs(asked, (Floor(**caller_floor),), wanted)) == kept


@pytest.mark.parametrize(
    "alias_floor, caller_floor, trust_declared, kept",
    [
        ({}, {}, False, "said"),
        ({"kl_mean": 0.01}, {}, True, "said"),
        ({}, {"kl_mean": 0.01}, True, "said"),
        ({"kl_mean": 0.01}, {}, False, ""),
        ({}, {"top1_agreement": 0.1}, False, ""),
        ({"kl_mean": 0.0001}, {}, True, ""),
        ({"kl_p99": 9}, {}, True, ""),
    ],
)
def test_declared_quality(
    alias_floor: dict[str, float], caller_floor: dict[str, float], trust_declared: bool, kept: str
) -> None:
    """A figure that somebody vouches for satisfies a floor only where the alias trusts it, and only if it is there."""
    asked = target(SAID, floor=Floor(**alias_floor), trust_declared=trust_declared)
    assert names(asked.filter_variants((Floor(**caller_floor),), None).kept) == kept


def test_a_pinned_variant_has_nobody_to_trust_it() -> None:
    """Its own name satisfies no floor by what is declared, whatever aliases say of it."""
    pinned = catalog("said", trust_declared=True).resolve("said")
    assert names(permitted_rungs(pinned, (NO_FLOOR,), None)) == "said"
    with pytest.raises(FloorUnmet) as caught:
        permitted_rungs(pinned, (Floor(top1_agreement=0.97),), None)
    assert caught.value.message == (
        "no variant of 'said' is good enough "
        "(said: top1_agreement 0.99 is declared, not measured (an alias can trust it: trust_declared))"
    )


def test_a_floor_that_nobody_meets_is_told_rung_by_rung() -> None:
    """The refusal says of each rung what it lacks."""
    with pytest.raises(FloorUnmet) as caught:
        permitted_rungs(target(HI, LO, ODD), (Floor(top1_agreement=0.95),), frozenset({"int4", "fp8"}))
    assert caught.value.message == (
        "no variant of 'smol' is good enough (hi: precision bf16 was not asked for; "
        "lo: top1_agreement 0.92 misses the floor 0.95; odd: top1_agreement is unknown, the floor is 0.95)"
    )


def test_the_strictest_reason_is_told() -> None:
    """A rung that the caller's precisions rule out is told so, even if its quality falls short as well."""
    with pytest.raises(FloorUnmet, match=r"lo: precision int4 was not asked for"):
        permitted_rungs(target(LO), (Floor(top1_agreement=0.99),), frozenset({"bf16"}))


@pytest.mark.parametrize(
    "ladder, options, rungs, permitted",
    [
        (("hi", "bad", "lo"), {}, "hi lo", "hi lo"),
        (("hi", "bad", "lo"), {"admit_failed": True}, "hi bad lo", "hi bad lo"),
        (("hi", "bad", "mid"), {"admit_failed": True, "floor": {"kl_mean": 0.01}}, "hi bad mid", "hi mid"),
        (("bad",), {}, "", ""),
        (("lo",), {"floor": {"kl_mean": 0.01}}, "lo", ""),
    ],
)
def test_a_failed_verdict(ladder: tuple[str, ...], options: dict[str, Any], rungs: str, permitted: str) -> None:
    """A variant whose evaluation said no isn't on a ladder unless the alias says so, and then it has floors to meet."""
    made = catalog(*ladder, **options)
    smol = made.resolve("smol")
    assert (names(smol.rungs), names(smol.permitted)) == (rungs, permitted)
    assert len(unservable_aliases(made)) == (not permitted)


def test_what_a_verdict_shuts_out_is_told() -> None:
    """Who configures it, and who asks, hear which limits were missed, and how to take the variant all the same."""
    why = "bad: its verdict is fail: kl_mean 0.05 misses 0.02, kl_p99 2 misses 1.5 (an alias can take it: admit_failed)"
    assert excluded_rungs(catalog("hi", "bad")) == [f"alias 'smol' never chooses {why}"]
    assert excluded_rungs(catalog("hi", "bad", admit_failed=True)) == []
    assert unservable_aliases(catalog("bad")) == [f"no variant of 'smol' is good enough ({why})"]
    with pytest.raises(FloorUnmet) as caught:
        permitted_rungs(catalog("hi", "bad").resolve("smol"), (NO_FLOOR,), frozenset({"int4"}))
    assert caught.value.message.endswith(f"(hi: precision bf16 was not asked for; {why})")
    assert replace(FAILED, manifest=manifest("fail")).failure == "its verdict is fail"
    assert PASSED.failure is None


def test_a_pin_reaches_a_variant_that_failed() -> None:
    """Its own name is a decision that somebody made."""
    assert names(permitted_rungs(catalog("hi").resolve("bad"), (NO_FLOOR, NO_FLOOR), None)) == "bad"


shares = st.none() | st.floats(0, 1)
ratios = st.none() | st.floats(0.5, 2)
figures = {
    "top1_agreement": shares,
    "kl_mean": shares,
    "perplexity_ratio": ratios,
    "kl_p99": shares,
    "length_ratio": ratios,
}
floors = st.builds(Floor, **figures) | st.just(NO_FLOOR)
qualities = st.just(PARENT_QUALITY) | st.builds(
    QualityMeasures, st.sampled_from(["measured", "declared", "unknown"]), **figures
)
precisions = st.sampled_from(["bf16", "int8", "int4"])
verdicts = st.none() | st.sampled_from([manifest("pass"), manifest("fail")])


def meets(variant: Variant, floor: Floor, trusts: bool) -> bool:
    """Say it in other words than the code: every limit has a figure that counts and is on its good side."""
    for measure in MEASURES:
        limit, value = getattr(floor, measure), getattr(variant.quality, measure)
        counts = value is not None and (variant.quality.source != "declared" or trusts)
        if limit is not None and not (counts and (value >= limit if measure in AT_LEAST else value <= limit)):
            return False
    return True


@given(
    st.lists(st.tuples(qualities, precisions, verdicts), min_size=1, max_size=5),
    st.tuples(floors, floors, floors),
    st.none() | st.frozensets(precisions),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_no_floor_is_ever_breached(
    made: list[tuple[QualityMeasures, str, Manifest | None]],
    limits: tuple[Floor, Floor, Floor],
    wanted: frozenset[str] | None,
    trusts: bool,
    admits: bool,
    pinned: bool,
) -> None:
    """Whatever ladder, floors and verdicts, every rung that is kept meets them all, and none that does is lost."""
    several = [
        Variant(f"v{number}", precision, quality, manifest=judged)
        for number, (quality, precision, judged) in enumerate(made)
    ]
    variants = {variant.name: variant for variant in several}
    settings = AliasSettings(ladder=tuple(variants), floor=limits[0], trust_declared=trusts, admit_failed=admits)
    asked = Catalog({"smol": settings}, variants).resolve("v0" if pinned else "smol")

    def good(variant: Variant) -> bool:
        failed = variant.manifest is not None and variant.manifest.quality.verdict == "fail"
        held_to = limits[1:] if pinned else limits
        return (
            all(meets(variant, floor, trusts and not pinned) for floor in held_to)
            and (wanted is None or variant.precision in wanted)
            and (pinned or admits or not failed)
        )

    left = tuple(filter(good, several[:1] if pinned else several))
    if left:
        assert permitted_rungs(asked, limits[1:], wanted) == left
    else:
        with pytest.raises(FloorUnmet):
            permitted_rungs(asked, limits[1:], wanted)
