"""Faults, floors, conversations and refusals in the simulator."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.schema import AliasSettings, Spill
from config.variant import QualityMeasures, Variant
from gateway.observability.metrics import Metrics
from gateway.proxy.decision_log import MAX_DECISIONS
from gateway.proxy.dispatcher import Dispatcher
from gateway.proxy.load.tracker import LoadTracker
from gateway.routing.request import RoutingRequest
from gateway.routing.sessions import MAX_SESSIONS
from gateway.routing.target import Catalog
from serving.registry import Registry
from serving.replica import Replica, State
from tests.benchmarks.routing import policies
from tests.benchmarks.routing.figures import Figures
from tests.benchmarks.routing.ours import Options
from tests.benchmarks.routing.profiles import QUALITY, fleet_of
from tests.benchmarks.routing.runs import Fault, Scenario
from tests.benchmarks.routing.scenarios import STRICT
from tests.benchmarks.routing.simulation import simulate
from tests.benchmarks.routing.workloads import CHATS, SINGLE, constant, conversations, square
from tests.gateway.proxy.dispatching import lease_or_wait
from tests.gateway.routing.goals import (
    CAPACITY,
    FLEET,
    MODEL,
    OBJECTIVE,
    SECONDS,
    found,
    ours,
    per_replica,
    uneven,
)

BEST = tuple(member.id for member in FLEET.only("bf16").members)


# Faults

VICTIM = BEST[0]
AT = 40.0
FAULTS: dict[str, Sequence[Fault]] = {
    "killed": [Fault(AT, VICTIM, "kill"), Fault(AT + 30, VICTIM, "restart")],
    "slow": [Fault(0.0, VICTIM, "slow", factor=5.0)],
    "slow for a while": [Fault(AT, VICTIM, "slow", factor=5.0), Fault(AT + 20, VICTIM, "slow", factor=1.0)],
    "one without polls": [Fault(AT, VICTIM, "stop polls"), Fault(AT + 10, VICTIM, "resume polls")],
    "no polls": [
        fault
        for each in FLEET.members
        for fault in (Fault(AT, each.id, "stop polls"), Fault(AT + 10, each.id, "resume polls"))
    ],
    "slow without polls": [Fault(AT, VICTIM, "stop polls"), Fault(AT, VICTIM, "slow", factor=5.0)],
    **{
        f"{metric} renamed": [Fault(AT, each.id, "lose metric", metric=metric) for each in FLEET.members]
        for metric in ("running", "waiting", "kv_usage")
    },
    "waiting renamed at one": [Fault(AT, VICTIM, "lose metric", metric="waiting")],
}
# The goodput that a fault may cost: turns in flight on a dead replica are lost, and a slow one is found by trying it.
COSTS = {"killed": 0.04, "slow": 0.015, "slow for a while": 0.015, "slow without polls": 0.035}
LITTLE = 0.005
# The least goodput at 125 % of the capacity, whatever it is without the fault.
LEAST = {"killed": 0.96, "slow": 0.95, "slow for a while": 0.97, "no polls": 0.98, "waiting renamed": 0.97}
STARVING_SECONDS = 80.0  # a slow replica is tried again about once a minute


def strict(times: float, faults: Sequence[Fault] = ()) -> Scenario:
    """A constant rate, at which one conversation in ten takes the best rung only."""
    rate = times * CAPACITY
    return Scenario(FLEET, conversations(constant(rate), rate, SECONDS, mix=STRICT), SECONDS, faults)


@pytest.fixture(scope="module")
def undisturbed() -> Callable[[float], Figures]:
    """The same without a fault."""
    known = {times: found(ours(strict(times))) for times in (0.7, 1.25)}
    return known.__getitem__


@pytest.mark.parametrize("times", [0.7, 1.25])
@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_costs_little(name: str, times: float, undisturbed: Callable[[float], Figures]) -> None:
    """Goodput drops little, floors hold, no replica is left out for good, and no healthy one gets too many turns."""
    run = ours(strict(times, FAULTS[name]))
    figures, before = found(run), undisturbed(times)
    assert figures.good_share >= before.good_share - COSTS.get(name, LITTLE)
    assert figures.good_share >= LEAST.get(name, 0.0)
    assert figures.below_floor == 0
    assert figures.refused == 0
    assert figures.agreement >= before.agreement - 0.01
    for begin in range(0, int(SECONDS - STARVING_SECONDS) + 1, 20):
        here = [each for each in run.outcomes if begin <= (each.sent_at or 0) < begin + STARVING_SECONDS]
        sent = per_replica(here, BEST)
        assert min(sent) > 0, (begin, sent)
        if not name.startswith(("killed", "slow")):
            assert uneven(sent) <= 1.3, (begin, sent)


@pytest.mark.parametrize("name", list(LEAST))
@pytest.mark.parametrize("kind", [policies.LeastInFlight, policies.CacheAware])
def test_policies_without_floors_break_them(name: str, kind: type[policies.Counting]) -> None:
    """The scenario is hard enough: under each of these faults, other policies answer below a floor."""
    assert found(simulate(strict(1.25, FAULTS[name]), lambda it: kind(it.fleet))).below_floor > 0


def test_a_replica_that_recovers_gets_its_share_again() -> None:
    """Within a minute, at a load that the other replica could carry alone."""
    slow = [Fault(0.0, VICTIM, "slow", factor=5.0), Fault(30.0, VICTIM, "slow", factor=1.0)]
    rate = 0.7 * CAPACITY
    run = ours(Scenario(FLEET, conversations(constant(rate), rate, 180.0), 180.0, slow))
    last = per_replica([each for each in run.outcomes if (each.sent_at or 0) > 120.0], BEST)
    assert uneven(last) <= 1.3, last


# Floors

members = st.dictionaries(st.sampled_from(sorted(QUALITY)), st.integers(1, 2), min_size=1)
kinds = st.sampled_from(["kill", "restart", "slow", "stop polls", "resume polls", "lose metric"])


@st.composite
def stormy(draw: st.DrawFn) -> Scenario:
    """Generate any fleet under any load, with floors and faults."""
    fleet = fleet_of(MODEL, draw(members))
    floor = draw(st.sampled_from([0.93, 0.95, 0.985, 0.99, 1.0]))
    mix = replace(CHATS, strict_share=draw(st.sampled_from([0.3, 1.0])), strict_floor=floor)
    rate = draw(st.sampled_from([2.0, 8.0, 25.0]))
    ids = st.sampled_from([member.id for member in fleet.members])
    faults = draw(
        st.lists(st.builds(Fault, st.floats(0, 12), ids, kinds, st.sampled_from([0.2, 5.0, 50.0])), max_size=4)
    )
    asked = conversations(constant(rate), rate, 12.0, mix=mix, seed=draw(st.integers(0, 99)))
    # A floor that nothing here meets is a refusal of the request, before any routing.
    best = max(member.agreement for member in fleet.members)
    asked = [each for each in asked if each.turns[0].floor is None or each.turns[0].floor <= best]
    return Scenario(fleet, asked, 12.0, faults)


@settings(max_examples=30, deadline=None)
@given(stormy(), st.booleans(), st.sampled_from([1.0, 30.0]))
def test_nothing_below_its_floor_ever_answers(scenario: Scenario, has_file: bool, patience_seconds: float) -> None:
    """Under any faults and any queue."""
    run = ours(scenario, Options(Spill(after_seconds=0.3, return_below_seconds=0.1), patience_seconds, has_file))
    for each in run.outcomes:
        assert not each.replica or each.turn.floor is None or each.agreement >= each.turn.floor
    assert found(run).below_floor == 0


# Conversations


def test_conversations_change_variants_rarely_and_between_turns_only() -> None:
    """On a wave that opens and closes gates, a conversation changes variants rarely, and each turn has one attempt."""
    asked = conversations(square(0.5 * CAPACITY, 2 * CAPACITY, 20.0), 2 * CAPACITY, SECONDS)
    run = ours(Scenario(FLEET, asked, SECONDS))
    figures = found(run)
    assert figures.alias_switches > 2
    assert figures.changed_share <= 0.05
    assert {each.tries for each in run.outcomes} == {1}
    blind = found(simulate(run.scenario, lambda it: policies.LeastInFlight(it.fleet)))
    assert figures.session_switches < 0.1 * blind.session_switches


def dispatches() -> Iterator[tuple[Dispatcher, LoadTracker, Catalog]]:
    """A dispatcher over two rungs with two replicas each, on a clock that stands still."""
    registry = Registry(lambda: 0.0)
    quality = QualityMeasures("measured", 0.0, 1.0, 1.0)
    catalog = Catalog(
        {"smol": AliasSettings(ladder=("hi", "lo"))},
        {"hi": Variant("hi", "bf16", quality), "lo": Variant("lo", "int4", quality)},
    )
    loads = LoadTracker(registry.in_flight, {}, lambda: 0.0)
    with Dispatcher(registry, loads, Metrics(), clock=lambda: 0.0) as dispatch:
        for name in ("hi", "lo"):
            for number in range(2):
                registry.put(Replica(f"{name}-{number}", name, "any", "http://nowhere", "m1"), State.READY)
        yield dispatch, loads, catalog


async def test_what_is_remembered_is_bounded() -> None:
    """After 50,000 conversations with different prompts, all tables have their maximum size."""
    asked = 50_000
    for dispatch, loads, catalog in dispatches():
        target = catalog.resolve("smol")
        for each in range(asked):
            request = RoutingRequest(
                target,
                target.permitted,
                dispatch.next_turn(),
                request_id=f"r{each}",
                prompt_tokens=1000.0,
                prompt_bytes=4000,
                blocks=tuple(range(16 * each, 16 * each + 16)),
                session=f"s{each}",
            )
            with await lease_or_wait(dispatch, request, 1.0) as lease:
                lease.in_flight.first_token()
                lease.succeeded()
        assert len(dispatch.affinity.placements()) == MAX_SESSIONS
        kept = [each for each in range(asked) if dispatch.decisions.find(f"r{each}") is not None]
        assert kept == list(range(asked - MAX_DECISIONS, asked))
        assert len(dispatch.cluster.gates) <= 2
        assert [each.unread_tokens for name in ("hi", "lo") for each in loads.replica_metrics(name)] == [0.0] * 4
        assert dispatch.affinity.blocks_held <= 4 * 4096


# Refusals


@pytest.mark.parametrize("patience_seconds", [2.0, 10.0])
def test_a_retry_after_is_what_it_takes(patience_seconds: float) -> None:
    """Beyond the capacity of all rungs, Retry-After is off by at most a second on average: its resolution."""
    rate = 16 * CAPACITY
    asked = conversations(constant(rate), rate, 20.0, mix=SINGLE)
    run = ours(Scenario(FLEET, asked, 20.0, most_asks=1), Options(patience_seconds=patience_seconds))
    figures = found(run)
    assert figures.refused > 100
    assert abs(figures.retry_error_seconds) <= 1.0
    assert figures.retry_error_p95_seconds <= 3.0


def test_a_retry_after_of_conversations_is_about_true() -> None:
    """Turns that follow answers, at six times the capacity: off by less than 5 s on average; no floor is broken."""
    figures = found(ours(strict(6.0), Options(patience_seconds=OBJECTIVE.first_token_seconds)))
    assert figures.refused > 100
    assert abs(figures.retry_error_seconds) < 5
    assert figures.below_floor == 0
