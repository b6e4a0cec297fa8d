"""Goals of routing, checked on simulated engines in virtual time: deterministic on any machine."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.capacity import Measurement
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
from tests.benchmarks.routing.calibration import measured
from tests.benchmarks.routing.figures import Figures, Objective, figures_of
from tests.benchmarks.routing.ours import Options, Ours
from tests.benchmarks.routing.profiles import MODELS, QUALITY, Fleet, fleet_of
from tests.benchmarks.routing.runs import Fault, Outcome, Run, Scenario
from tests.benchmarks.routing.scenarios import STRICT, Ground, steady, wave
from tests.benchmarks.routing.simulation import simulate
from tests.benchmarks.routing.workloads import CHATS, SINGLE, Conversation, Turn, constant, conversations, square
from tests.gateway.proxy.dispatching import lease_or_wait

MODEL = "32b"
FLEET = fleet_of(MODEL, {"bf16": 2, "int8": 1, "int4": 1})
BEST = tuple(member.id for member in FLEET.only("bf16").members)
# Turns a second that the best rung takes: what scenarios.best_rung_capacity finds for this fleet.
CAPACITY = 4.4
SECONDS = 120.0
GROUND = Ground(FLEET, CAPACITY, SECONDS)
OBJECTIVE = Objective()
MEASURED: Mapping[str, Measurement] = {rung: measured(MODELS[MODEL][rung], requests=80) for rung in FLEET.rungs}
MEASURED_TOO, UNMEASURED = Options(), Options(measured=False)
# Policies that look at load or at prompts, and ignore quality.
BLIND = (
    policies.RoundRobin,
    policies.LeastInFlight,
    policies.PowerOfTwo,
    policies.CacheAware,
    policies.LeastLoad,
)
NOISE = 0.005  # of goodput, a share
SILENT = [Fault(10.0, member.id, "stop polls") for member in FLEET.members]

both = pytest.mark.parametrize("options", [MEASURED_TOO, UNMEASURED], ids=["measured", "unmeasured"])


def ours(
    scenario: Scenario, options: Options = MEASURED_TOO, measurements: Mapping[str, Measurement] = MEASURED
) -> Run:
    """Simulate a scenario under the gateway's own dispatcher."""
    return simulate(scenario, lambda it: Ours(it.fleet, measurements, options))


def found(run: Run) -> Figures:
    """The figures of a run."""
    return figures_of(run, OBJECTIVE)


def per_replica(outcomes: Sequence[Outcome], replicas: Sequence[str]) -> list[int]:
    """The number of turns that each replica was sent."""
    counts = Counter(outcome.replica for outcome in outcomes)
    return [counts[replica] for replica in replicas]


def uneven(counts: Sequence[int]) -> float:
    """The largest count divided by the mean."""
    return max(counts) * len(counts) / sum(counts)


# Quality and goodput


def at_load(times: float) -> Scenario:
    """A constant rate, in multiples of what the best rung takes."""
    return steady(GROUND, times, 1)


@cache
def blind(times: float) -> list[Figures]:
    """What every policy that ignores quality makes of the same load."""
    return [found(simulate(at_load(times), lambda it, kind=kind: kind(it.fleet, it.seed))) for kind in BLIND]  # type: ignore[misc]


def test_below_what_the_best_rung_takes_nothing_spills() -> None:
    """At 70 % of its capacity the best rung answers everything, and no conversation changes its variant."""
    figures = found(ours(at_load(0.7)))
    assert figures.shares == {"bf16": 1.0, "int8": 0.0, "int4": 0.0}
    assert figures.agreement == QUALITY["bf16"]
    assert figures.good_share == 1.0
    assert (figures.alias_switches, figures.session_switches) == (0.0, 0.0)


def test_without_a_measurement_hardly_anything_does() -> None:
    """Service rates learned from polls are less exact: up to 1 % may spill."""
    figures = found(ours(at_load(0.7), UNMEASURED))
    assert figures.shares["bf16"] >= 0.99
    assert figures.good_share == 1.0


@pytest.mark.parametrize("times", [1.0, 1.25, 1.5])
def test_under_more_load_as_many_answers_are_good_and_they_are_better(times: float) -> None:
    """Goodput is the best peer's within NOISE, and quality is above that of every policy that ignores it."""
    mine = found(ours(at_load(times)))
    assert mine.good_share >= max(each.good_share for each in blind(times)) - NOISE
    assert mine.agreement > max(each.agreement for each in blind(times)) + 0.005
    assert mine.agreement > 0.995
    assert mine.shares["bf16"] > mine.shares["int8"] >= mine.shares["int4"]


def test_without_a_measurement_it_learns_from_the_load() -> None:
    """At 125 % goodput is within 2 points of the best peer's, and quality above that of all of them."""
    mine = found(ours(at_load(1.25), UNMEASURED))
    assert mine.good_share >= max(each.good_share for each in blind(1.25)) - 0.02
    assert mine.agreement > max(each.agreement for each in blind(1.25))


# Gates


class Watched(Ours):
    """Records when each spill gate opened and closed."""

    def __init__(self, fleet: Fleet, options: Options) -> None:
        super().__init__(fleet, MEASURED, options)
        self.turned: dict[str, list[tuple[float, bool]]] = defaultdict(list)

    def _note_switches(self, now: float) -> None:
        super()._note_switches(now)
        for (_, rung), gate in self.dispatch.cluster.gates.items():
            turns = self.turned[rung]
            if gate.spilling != bool(turns and turns[-1][1]):
                turns.append((gate.since_seconds, gate.spilling))


@pytest.mark.parametrize("dwell_seconds", [3.0, 10.0])
@pytest.mark.parametrize("period_in_dwells", [0.2, 0.9, 1.0, 1.1, 2.0, 2.2])
@pytest.mark.parametrize("low, high", [(0.5, 2.0), (0.2, 6.0)])
def test_a_gate_returns_once_in_its_dwell_time_at_most(
    dwell_seconds: float, period_in_dwells: float, low: float, high: float
) -> None:
    """Under any period of the load, with thresholds of spilling and returning that almost meet."""
    spill = Spill(after_seconds=0.5, return_below_seconds=0.45, dwell_seconds=dwell_seconds)
    rate = square(low * CAPACITY, high * CAPACITY, period_in_dwells * dwell_seconds)
    asked = conversations(rate, high * CAPACITY, 60.0)
    made: list[Watched] = []

    def make(scenario: Scenario) -> Watched:
        made.append(Watched(scenario.fleet, Options(spill)))
        return made[-1]

    simulate(Scenario(FLEET, asked, 60.0), make)
    returns = {rung: [at for at, spilling in turns if not spilling] for rung, turns in made[0].turned.items()}
    assert sum(map(len, returns.values())) > 0, "the wave never makes a gate return"
    assert all(later - before >= dwell_seconds for each in returns.values() for before, later in pairwise(each))
    assert set(returns) <= {"bf16", "int8"}  # the last rung can't spill


def test_a_slow_wave_costs_no_goodput() -> None:
    """A load around the capacity with a period of three dwell times: good answers, and few changes of variant."""
    spill = Spill(after_seconds=1.0, return_below_seconds=0.25, dwell_seconds=20.0)
    figures = found(ours(wave(GROUND, seed=4), Options(spill=spill)))
    assert figures.alias_switches <= 2 * 2 * 60 / spill.dwell_seconds  # two gates open and close once a dwell time
    assert figures.good_share > 0.99
    assert figures.session_switches < 0.5


# Bursts


def burst(kind: str, count: int, tokens: int) -> Scenario:
    """64 turns with the same prompt within a quarter of a second."""
    fleet, chain = fleet_of(MODEL, {"bf16": count}), tuple(range((tokens + 100) // 16))
    turns = [
        Turn(each, "one" if "session" in kind else f"b{each}", 0, tokens, 100, tokens, chain, 1.0) for each in range(64)
    ]
    asked = [Conversation(30.0 + each.key / 256, (each,)) for each in turns]
    if "cached" in kind:
        asked.insert(0, Conversation(20.0, (replace(turns[0], key=64, session="one", answer_tokens=10),)))
    faults = [Fault(10.0, member.id, "stop polls") for member in fleet.members] if "stale" in kind else []
    return Scenario(fleet, asked, 60.0, faults)


@both
@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize(
    "kind, tokens",
    [
        *product(["", "cached", "session", "cached session", "stale", "cached stale"], [800, 2000]),
        # Without polls, and if prefill takes longer than the burst, the replica that has the prompt cached is sooner.
        *product(["", "cached", "session", "cached session"], [8000]),
    ],
)
def test_a_burst_spreads(kind: str, tokens: int, count: int, options: Options) -> None:
    """Also if one replica has the prompt cached, if all turns are of one conversation, and without polls."""
    run = ours(burst(kind, count, tokens), options)
    sent = per_replica(
        [each for each in run.outcomes if each.turn.key < 64], [each.id for each in run.scenario.fleet.members]
    )
    assert sum(sent) == 64
    assert uneven(sent) <= 1.3, sent


@pytest.mark.parametrize("tokens", [8000, 12_000])
def test_a_replica_with_a_very_long_prompt_cached_gets_more_turns(tokens: int) -> None:
    """Without polls, too: answers take no longer, on average, than with equal shares."""
    scenario = burst("cached stale", 8, tokens)
    mine, even = (
        sum((each.ended_at or 0) - each.asked_at for each in run.outcomes) / len(run.outcomes)
        for run in (ours(scenario), simulate(scenario, lambda it: policies.LeastInFlight(it.fleet)))
    )
    assert mine <= 1.02 * even


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
    assert figures.alias_switches > 4
    assert figures.session_switches <= 0.4
    assert {each.tries for each in run.outcomes} == {1}
    blind = found(simulate(run.scenario, lambda it: policies.LeastInFlight(it.fleet)))
    assert figures.session_switches < 0.4 * blind.session_switches


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
