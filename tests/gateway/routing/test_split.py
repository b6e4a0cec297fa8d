"""Rungs with weighted members: the draw of a member, filters by member, and decisions while a rollout runs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from config.schema import NO_FLOOR, Floor
from config.variant import Variant
from gateway.proxy.decision_log import DecisionLog
from gateway.routing.cluster_state import ClusterState
from gateway.routing.explain import explain, explain_recorded
from gateway.routing.filters import filter_failed, filter_rungs
from gateway.routing.latency import LatencyEstimate
from gateway.routing.overload import Overload
from gateway.routing.pick import decide, drawn_names, has_room
from gateway.routing.request import RoutingRequest
from gateway.routing.sessions import Placement
from gateway.routing.snapshot import TargetView, read_snapshot
from gateway.routing.spill import SpillGate
from gateway.routing.split import Rung, RungWeights, Weights, choose_member
from gateway.routing.target import Target
from tests.gateway.routing.clusters import (
    HI,
    LO,
    LO_RUNG,
    MID,
    NOW,
    SPILL,
    chosen,
    cluster,
    decision,
    estimate,
    named,
    opened,
    request,
)
from tests.gateway.routing.test_filters import FAILED

# The stable variant is `hi`, the canary is `mid`.
BEST = Rung("best", ((HI, 0.75), (MID, 0.25)))
THREE = Rung("three", ((HI, 0.5), (MID, 0.3), (LO, 0.2)))
TARGET = Target("smol", (BEST, LO_RUNG), NO_FLOOR, pinned=False, spill=SPILL)
KEYS = [f"conversation-{number}" for number in range(20_000)]


Shares = tuple[float, ...]


def by_name(rung: Rung, shares: Shares | None) -> Weights | None:
    """Weights of the members, given in their order."""
    return None if shares is None else dict(zip(rung.names, shares, strict=True))


def draws(rung: Rung, shares: Shares | None = None) -> list[str]:
    """The names of the members that the keys are drawn to."""
    drawn = [choose_member(rung, key, by_name(rung, shares)) for key in KEYS]
    return [variant.name for variant in drawn if variant is not None]


def split_request(**fields: Any) -> RoutingRequest:
    """A request for an alias whose best rung has two members."""
    return request(target=TARGET, rungs=TARGET.permitted, prompt_tokens=100, **fields)


def weights_of(*weights: float, revision: int = 1) -> RungWeights:
    """Weights of the best rung, as a rollout sets them."""
    return RungWeights(revision, {("smol", "best"): dict(zip(BEST.names, weights, strict=True))})


def session_of(variant: Variant) -> str:
    """A session that is drawn to a member by the configured weights."""
    return next(key for key in KEYS if choose_member(BEST, key) is variant)


STABLE_SESSION, CANARY_SESSION = session_of(HI), session_of(MID)


# Rungs


def test_a_rung_of_one_variant() -> None:
    """It is named like its variant, which is its only member."""
    rung = Rung.of(HI)
    assert (rung.name, rung.variants, rung.only) == ("hi", (HI,), HI)
    assert rung.has("hi")
    assert not rung.has("mid")


def test_a_rung_of_two_variants() -> None:
    """The stable variant comes first, and none is the only one."""
    assert (BEST.name, BEST.variants, BEST.only) == ("best", (HI, MID), None)
    assert BEST.has("hi")
    assert BEST.has("mid")
    assert not BEST.has("best")


# The draw


@pytest.mark.parametrize(
    "rung, weights",
    [
        (BEST, None),
        (BEST, (0.99, 0.01)),
        (BEST, (0.5, 0.5)),
        (BEST, (9.0, 1.0)),
        (BEST, (0.01, 0.03)),
        (THREE, None),
        (THREE, (1.0, 1.0, 2.0)),
    ],
)
def test_the_shares_are_the_weights(rung: Rung, weights: Shares | None) -> None:
    """Of 20,000 fixed keys each member gets its share of the weights, within one percentage point."""
    counts = Counter(draws(rung, weights))
    shares = weights or [weight for _, weight in rung.members]
    for variant, share in zip(rung.variants, shares, strict=True):
        assert counts[variant.name] / len(KEYS) == pytest.approx(share / sum(shares), abs=0.01)


def test_a_key_keeps_its_member() -> None:
    """A draw depends on the names and weights only: it is the same in every process, and in later versions."""
    assert draws(BEST) == draws(Rung("best", ((HI, 0.75), (MID, 0.25))))
    letters = "".join("c" if choose_member(BEST, key) is MID else "s" for key in KEYS[:32])
    assert letters == "sssscssssssssssscsssccsssssscsss"


def test_rungs_draw_independently() -> None:
    """A conversation on the canary of one rung is not therefore on the canary of another."""
    other = replace(BEST, name="other")
    both = sum(first == second == "mid" for first, second in zip(draws(BEST), draws(other), strict=True))
    assert both / len(KEYS) == pytest.approx(0.25 * 0.25, abs=0.01)


@pytest.mark.parametrize(
    "rung, weights, drawn",
    [
        (BEST, (1.0, 0.0), {"hi"}),
        (BEST, (0.0, 1.0), {"mid"}),
        (BEST, (0.0, 0.001), {"mid"}),
        (THREE, (0.0, 0.5, 0.5), {"mid", "lo"}),
        (THREE, (0.5, 0.0, 0.5), {"hi", "lo"}),
        (THREE, (0.5, 0.5, 0.0), {"hi", "mid"}),
    ],
)
def test_a_member_of_weight_zero_is_never_drawn(rung: Rung, weights: Shares, drawn: set[str]) -> None:
    """None of 20,000 keys is drawn to a member of weight 0, wherever it stands."""
    assert set(draws(rung, weights)) == drawn


@pytest.mark.parametrize(
    "before, after",
    [((0.9, 0.1), (0.5, 0.5)), ((0.99, 0.01), (0.95, 0.05)), ((0.5, 0.5), (1.0, 0.0)), ((9.0, 1.0), (9.0, 3.0))],
)
def test_a_change_of_weights_moves_few_conversations(before: Shares, after: Shares) -> None:
    """Only conversations of the member whose share shrinks move, and as many as its share shrinks by."""
    shrinking, growing = (HI, MID) if after[0] / sum(after) < before[0] / sum(before) else (MID, HI)
    moves = [pair for pair in zip(draws(BEST, before), draws(BEST, after), strict=True) if pair[0] != pair[1]]
    assert set(moves) == {(shrinking.name, growing.name)}
    difference = abs(after[0] / sum(after) - before[0] / sum(before))
    assert len(moves) / len(KEYS) == pytest.approx(difference, abs=0.01)


@pytest.mark.parametrize(
    "weights, drawn",
    [
        ({}, None),
        ({"lo": 1.0}, None),
        ({"hi": 0.0, "mid": 0.0}, None),
        ({"hi": 1.0}, HI),
        ({"mid": 1.0, "x": 9.0}, MID),
    ],
)
def test_members_without_a_weight(weights: Weights, drawn: Variant | None) -> None:
    """A member that the weights do not name is never drawn; names that are no members change nothing."""
    assert {choose_member(BEST, key, weights) for key in KEYS[:50]} == {drawn}


def test_a_member_that_is_left_by_a_floor_keeps_its_weight() -> None:
    """An aborted canary does not answer, also where a request's precisions leave no other member."""
    wanted = split_request(precisions=frozenset({"int8"}))
    left = TARGET.filter((), frozenset({"int8"})).permitted
    assert [rung.names for rung in left] == [("mid",)]
    only_canary = msgspec.structs.replace(wanted, rungs=left)
    aborted = weights_of(1.0, 0.0)
    assert chosen(estimate("hi-1"), estimate("mid-1"), request=only_canary) == "mid-1 canary"
    assert chosen(estimate("hi-1"), estimate("mid-1"), request=only_canary, weights=lambda: aborted) is None


def test_a_single_member_needs_no_weights() -> None:
    """It is drawn for every key."""
    assert {choose_member(LO_RUNG, key) for key in KEYS[:100]} == {LO}


# Filters


@pytest.mark.parametrize(
    "floor, precisions, permitted, rejected",
    [
        ({}, None, {"best": ["hi", "mid"]}, {}),
        ({"kl_mean": 0.001}, None, {"best": ["hi"]}, {"mid": "kl_mean 0.01 misses the floor 0.001"}),
        ({}, {"int8"}, {"best": ["mid"]}, {"hi": "precision bf16 was not asked for"}),
        (
            {"kl_mean": 0.001},
            {"int8"},
            {},
            {"hi": "precision bf16 was not asked for", "mid": "kl_mean 0.01 misses the floor 0.001"},
        ),
    ],
)
def test_members_are_filtered_one_by_one(
    floor: dict[str, float], precisions: set[str] | None, permitted: dict[str, list[str]], rejected: dict[str, str]
) -> None:
    """A rung keeps the members that satisfy floor and precisions, with their weights, and goes with its last one."""
    accepted = None if precisions is None else frozenset(precisions)
    result = filter_rungs([BEST], [Floor(**floor)], accepted, trust_declared=False)
    assert {rung.name: [variant.name for variant in rung.variants] for rung in result.permitted} == permitted
    assert {rejection.variant.name: rejection.why for rejection in result.rejected} == rejected
    members = dict(BEST.members)
    assert all(members[variant] == weight for rung in result.permitted for variant, weight in rung.members)


def test_a_canary_that_failed_its_evaluation() -> None:
    """It leaves its rung to the stable variant."""
    result = filter_failed([Rung("best", ((HI, 0.9), (FAILED, 0.1)))])
    assert [(rung.name, rung.only) for rung in result.permitted] == [("best", HI)]
    assert [rejection.variant.name for rejection in result.rejected] == ["bad"]


# Decisions


@pytest.mark.parametrize(
    "session, estimates, expected",
    [
        (STABLE_SESSION, [estimate("hi-1", 1.0), estimate("mid-1"), estimate("lo-1")], "hi-1 preferred"),
        (CANARY_SESSION, [estimate("hi-1"), estimate("mid-1", 1.0), estimate("lo-1")], "mid-1 canary"),
        # If the drawn member is slow, full or gone, the next rung answers, not the other member.
        (CANARY_SESSION, [estimate("hi-1"), estimate("mid-1", 9.0), estimate("lo-1")], "lo-1 spill"),
        (CANARY_SESSION, [estimate("hi-1"), estimate("mid-1", has_room=False), estimate("lo-1")], "lo-1 spill"),
        (CANARY_SESSION, [estimate("hi-1"), estimate("lo-1")], "lo-1 fallback"),
        (CANARY_SESSION, [estimate("hi-1")], None),
        (STABLE_SESSION, [estimate("mid-1")], None),
    ],
)
def test_the_drawn_member_is_asked(session: str, estimates: Sequence[LatencyEstimate], expected: str | None) -> None:
    """Only the replicas of the drawn member are candidates; `canary` is the second member of the best rung."""
    assert chosen(*estimates, request=split_request(session=session)) == expected


def test_a_decision_looks_at_the_drawn_member_only() -> None:
    """The estimates of the other member are not read."""
    looked_up: list[str] = []

    def estimates(variant: str) -> Sequence[LatencyEstimate]:
        looked_up.append(variant)
        return [estimate(f"{variant}-1")]

    for session in (STABLE_SESSION, CANARY_SESSION):
        decide(split_request(session=session), ClusterState(estimates), NOW)
    assert looked_up == ["hi", "mid"]


def test_a_request_without_a_session_is_drawn_by_its_id() -> None:
    """Its retries are drawn to the same member, other requests to theirs."""
    state = cluster(estimate("hi-1"), estimate("mid-1"))
    for request_id in (STABLE_SESSION, CANARY_SESSION):
        by_id, by_session = split_request(request_id=request_id), split_request(session=request_id, request_id="x")
        assert named(decide(by_id, state, NOW)) == named(decide(by_session, state, NOW))
    counts = Counter(named(decide(split_request(request_id=key), state, NOW)) for key in KEYS[:2000])
    assert counts["mid-1 canary"] / 2000 == pytest.approx(0.25, abs=0.03)
    assert counts.keys() == {"hi-1 preferred", "mid-1 canary"}


def test_the_second_member_of_a_lower_rung() -> None:
    """A lower rung answers because of load or for want of a replica, whichever its member is."""
    target = Target("smol", (LO_RUNG, BEST), NO_FLOOR, pinned=False, spill=SPILL)
    below = request(target=target, rungs=target.permitted, session=CANARY_SESSION)
    assert chosen(estimate("lo-1", 9.0), estimate("hi-1"), estimate("mid-1"), request=below) == "mid-1 spill"
    assert chosen(estimate("hi-1"), estimate("mid-1"), request=below) == "mid-1 fallback"


def test_has_room_for_the_drawn_member() -> None:
    """Room at the other member is of no use to a request; also where a breaker is open, or a replica overloaded."""
    full, free = estimate("hi-1", has_room=False), estimate("mid-1")
    state = cluster(full, free)
    assert not has_room(drawn_names(split_request(session=STABLE_SESSION), state), state, NOW)
    assert has_room(drawn_names(split_request(session=CANARY_SESSION), state), state, NOW)
    barred = cluster(estimate("hi-1"), free, breakers={"hi-1": opened(), "mid-1": opened()})
    for session, expected in ((STABLE_SESSION, "hi-1 preferred"), (CANARY_SESSION, "mid-1 canary")):
        assert has_room(drawn_names(split_request(session=session), barred), barred, 0.5)
        assert named(decide(split_request(session=session), barred, 0.5)) == expected
    spared = cluster(estimate("hi-1"), free, overloads={"mid-1": Overload(until=NOW + 1)})
    assert has_room(drawn_names(split_request(session=STABLE_SESSION), spared), spared, NOW)
    assert not has_room(drawn_names(split_request(session=CANARY_SESSION), spared), spared, NOW)


def test_sessions_follow_the_weights() -> None:
    """When the weight of a member becomes 0, its conversations continue on the other one, and return with it."""
    estimates = estimate("hi-1"), estimate("mid-1")
    on_canary = split_request(session=CANARY_SESSION, placement=Placement("mid", "mid-1"))
    on_stable = split_request(session=STABLE_SESSION, placement=Placement("hi", "hi-1"))
    live = weights_of(0.75, 0.25)
    state = cluster(*estimates, weights=lambda: live)
    assert [named(decide(each, state, NOW)) for each in (on_stable, on_canary)] == ["hi-1 preferred", "mid-1 canary"]
    live = weights_of(1.0, 0.0, revision=2)
    assert [named(decide(each, state, NOW)) for each in (on_stable, on_canary)] == ["hi-1 preferred"] * 2
    live = weights_of(0.0, 1.0, revision=3)
    assert [named(decide(each, state, NOW)) for each in (on_stable, on_canary)] == ["mid-1 canary"] * 2


def test_weights_of_another_rung_change_nothing() -> None:
    """Weights count for one rung of one alias."""
    others = RungWeights(1, {("smol", "lo"): {"hi": 1.0}, ("other", "best"): {"hi": 1.0}})
    on_canary = split_request(session=CANARY_SESSION)
    assert chosen(estimate("hi-1"), estimate("mid-1"), request=on_canary, weights=lambda: others) == "mid-1 canary"


def test_both_members_have_one_gate_and_one_home() -> None:
    """The gate is the rung's, and a conversation is at home on the rung whichever member answered it last."""
    slow = estimate("hi-1"), estimate("mid-1", 9.0), estimate("lo-1")
    made = decision(*slow, request=split_request(session=CANARY_SESSION))
    assert {key: gate.spilling for key, gate in made.gates.items()} == {("smol", "best"): True}
    spilling = {("smol", "best"): SpillGate(spilling=True, owed=0.99)}
    waiting = estimate("hi-1", 1.5), estimate("mid-1", 1.5), estimate("lo-1")
    new = split_request(session=STABLE_SESSION)
    assert chosen(*waiting, request=new, gates=spilling) == "lo-1 spill"
    at_home = split_request(session=STABLE_SESSION, placement=Placement("mid", "mid-1"))
    assert chosen(*waiting, request=at_home, gates=spilling) == "hi-1 preferred"


# Explanations


@pytest.mark.parametrize("weights, replica", [(None, "mid-1"), ((1.0, 0.0), "hi-1")])
def test_an_explanation_makes_the_same_draw(weights: Shares | None, replica: str) -> None:
    """A decision is explained with the weights that it was made with, also from its record."""
    live = RungWeights() if weights is None else weights_of(*weights)
    state = cluster(estimate("hi-1"), estimate("mid-1"), estimate("lo-1"), weights=lambda: live)
    drawn = split_request(session=CANARY_SESSION, request_id="r")
    explanation = explain(drawn, state, NOW)
    assert explanation.chosen is not None
    assert explanation.chosen.replica == replica
    decisions = DecisionLog()
    decisions.append(drawn, state, decide(drawn, state, NOW), NOW)
    live = weights_of(0.5, 0.5, revision=2)
    record = decisions.find("r")
    assert record is not None
    assert explain_recorded(read_snapshot(record.snapshot(NOW).to_json(), "f")) == explanation


def test_a_snapshot_has_the_weights_of_a_rollout() -> None:
    """They replace those of the configuration."""
    assert TargetView.of(TARGET, 30.0, RungWeights()).rungs == {"best": {"hi": 0.75, "mid": 0.25}, "lo": {"lo": 1.0}}
    assert TargetView.of(TARGET, 30.0, weights_of(0.4, 0.6)).rungs["best"] == {"hi": 0.4, "mid": 0.6}
