"""Which variants of a ladder may answer a request: floors, precisions and failed evaluations."""

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
from tests.config.sealed import QUALITY, manifest_of

HI = Variant("hi", "bf16", PARENT_QUALITY)
MID = Variant("mid", "int8", QualityMeasures("measured", 0.01, 0.97, 1.01, 0.2, 1.05))
LO = Variant("lo", "int4", QualityMeasures("measured", 0.05, 0.92, 1.05))
ODD = Variant("odd", "fp8", QualityMeasures("unknown"))
DECLARED = Variant("declared", "fp8", QualityMeasures("declared", kl_mean=0.001, top1_agreement=0.99))
CHECKS = [
    {"name": "kl_mean", "value": 0.05, "limit": 0.02, "passed": False},
    {"name": "top1_agreement", "value": 0.92, "limit": 0.9, "passed": True},
    {"name": "kl_p99", "value": 2, "limit": 1.5, "passed": False},
]


def manifest(verdict: str, checks: list[dict[str, Any]] | None = None) -> Manifest:
    """A manifest with this verdict and these checks."""
    quality = {**QUALITY, "verdict": verdict, "checks": checks or []}
    return Manifest.model_validate({**manifest_of(4), "quality": quality})


PASSED = replace(MID, manifest=manifest("pass"))
FAILED = replace(LO, name="bad", manifest=manifest("fail", CHECKS))
VARIANTS = {variant.name: variant for variant in (HI, MID, LO, ODD, DECLARED, FAILED)}


def catalog(*ladder: str, **options: Any) -> Catalog:
    """One alias over some of the variants above."""
    return Catalog({"smol": AliasSettings.model_validate({"ladder": ladder, **options})}, VARIANTS)


def target(*ladder: Variant, floor: Floor = NO_FLOOR, trust_declared: bool = False) -> Target:
    """An alias with this ladder."""
    return Target("smol", tuple(ladder), floor, False, trust_declared=trust_declared)


def names(rungs: tuple[Variant, ...]) -> str:
    """The variants of some rungs by name."""
    return " ".join(rung.name for rung in rungs)


@pytest.mark.parametrize(
    "alias_floor, caller_floor, precisions, permitted",
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
def test_floors_and_precisions(
    alias_floor: dict[str, float], caller_floor: dict[str, float], precisions: set[str] | None, permitted: str
) -> None:
    """A rung is permitted if it satisfies all floors and the precisions; an unknown quality satisfies no floor."""
    ladder = target(HI, MID, LO, ODD, floor=Floor(**alias_floor))
    accepted = None if precisions is None else frozenset(precisions)
    assert names(ladder.permitted_rungs((Floor(**caller_floor),), accepted)) == permitted


@pytest.mark.parametrize(
    "alias_floor, caller_floor, trust_declared, permitted",
    [
        ({}, {}, False, "declared"),
        ({"kl_mean": 0.01}, {}, True, "declared"),
        ({}, {"kl_mean": 0.01}, True, "declared"),
        ({"kl_mean": 0.01}, {}, False, ""),
        ({}, {"top1_agreement": 0.1}, False, ""),
        ({"kl_mean": 0.0001}, {}, True, ""),
        ({"kl_p99": 9}, {}, True, ""),
    ],
)
def test_declared_quality(
    alias_floor: dict[str, float], caller_floor: dict[str, float], trust_declared: bool, permitted: str
) -> None:
    """A declared figure satisfies a floor only if it is given and the alias trusts it."""
    ladder = target(DECLARED, floor=Floor(**alias_floor), trust_declared=trust_declared)
    assert names(ladder.filter((Floor(**caller_floor),), None).permitted) == permitted


def test_a_pinned_variant_is_not_trusted() -> None:
    """Declared figures of a pinned variant satisfy no floor, even if an alias trusts them."""
    pinned = catalog("declared", trust_declared=True).resolve("declared")
    assert names(pinned.permitted_rungs((NO_FLOOR,), None)) == "declared"
    with pytest.raises(FloorUnmet) as caught:
        pinned.permitted_rungs((Floor(top1_agreement=0.97),), None)
    assert caught.value.message == (
        "no variant of 'declared' is good enough "
        "(declared: top1_agreement 0.99 is declared, not measured (an alias can trust it: trust_declared))"
    )


def test_an_unmet_floor_names_the_reason_of_each_rung() -> None:
    """FloorUnmet says for each rung what it lacks."""
    with pytest.raises(FloorUnmet) as caught:
        target(HI, LO, ODD).permitted_rungs((Floor(top1_agreement=0.95),), frozenset({"int4", "fp8"}))
    assert caught.value.message == (
        "no variant of 'smol' is good enough (hi: precision bf16 was not asked for; "
        "lo: top1_agreement 0.92 misses the floor 0.95; odd: top1_agreement is unknown, the floor is 0.95)"
    )


def test_the_precision_is_checked_before_the_floor() -> None:
    """A rung whose precision is not accepted is rejected for that, even if it misses the floor as well."""
    with pytest.raises(FloorUnmet, match=r"lo: precision int4 was not asked for"):
        target(LO).permitted_rungs((Floor(top1_agreement=0.99),), frozenset({"bf16"}))


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
    """A variant that failed its evaluation is excluded unless the alias admits it; then floors apply to it."""
    aliases = catalog(*ladder, **options)
    smol = aliases.resolve("smol")
    assert (names(smol.rungs), names(smol.permitted)) == (rungs, permitted)


def test_the_reason_of_an_exclusion() -> None:
    """A refusal names the limits that were missed, and the option that admits the variant."""
    why = "bad: its verdict is fail: kl_mean 0.05 misses 0.02, kl_p99 2 misses 1.5 (an alias can take it: admit_failed)"
    assert [str(each) for each in catalog("hi", "bad").resolve("smol").excluded] == [why]
    assert catalog("hi", "bad", admit_failed=True).resolve("smol").excluded == ()
    with pytest.raises(FloorUnmet) as caught:
        catalog("hi", "bad").resolve("smol").permitted_rungs((NO_FLOOR,), frozenset({"int4"}))
    assert caught.value.message.endswith(f"(hi: precision bf16 was not asked for; {why})")
    assert replace(FAILED, manifest=manifest("fail")).failure == "its verdict is fail"
    assert PASSED.failure is None


def test_a_failed_variant_can_be_pinned() -> None:
    """The name of a variant reaches it even if its evaluation failed."""
    assert names(catalog("hi").resolve("bad").permitted_rungs((NO_FLOOR, NO_FLOOR), None)) == "bad"


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
    """An independent check: every limit has a figure that counts and is on its good side."""
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
    measured: list[tuple[QualityMeasures, str, Manifest | None]],
    limits: tuple[Floor, Floor, Floor],
    accepted: frozenset[str] | None,
    trusts: bool,
    admits: bool,
    pinned: bool,
) -> None:
    """For any ladder, floors and verdicts, the permitted rungs are exactly those that satisfy all of them."""
    several = [
        Variant(f"v{number}", precision, quality, manifest=judged)
        for number, (quality, precision, judged) in enumerate(measured)
    ]
    variants = {variant.name: variant for variant in several}
    settings = AliasSettings(ladder=tuple(variants), floor=limits[0], trust_declared=trusts, admit_failed=admits)
    resolved = Catalog({"smol": settings}, variants).resolve("v0" if pinned else "smol")

    def good(variant: Variant) -> bool:
        failed = variant.manifest is not None and variant.manifest.quality.verdict == "fail"
        applied = limits[1:] if pinned else limits
        return (
            all(meets(variant, floor, trusts and not pinned) for floor in applied)
            and (accepted is None or variant.precision in accepted)
            and (pinned or admits or not failed)
        )

    expected = tuple(filter(good, several[:1] if pinned else several))
    if expected:
        assert resolved.permitted_rungs(limits[1:], accepted) == expected
    else:
        with pytest.raises(FloorUnmet):
            resolved.permitted_rungs(limits[1:], accepted)
