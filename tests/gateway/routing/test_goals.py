"""Goals of routing, checked on simulated engines in virtual time: deterministic on any machine."""

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise, product

import pytest

from config.schema import Spill
from tests.benchmarks.routing import policies
from tests.benchmarks.routing.ours import Options, Ours
from tests.benchmarks.routing.profiles import QUALITY, Fleet, fleet_of
from tests.benchmarks.routing.runs import Fault, Scenario
from tests.benchmarks.routing.scenarios import Ground, steady, wave
from tests.benchmarks.routing.scenarios import burst as burst_of_one_prompt
from tests.benchmarks.routing.simulation import simulate
from tests.benchmarks.routing.workloads import CHATS, Conversation, Turn, conversations, square
from tests.gateway.routing.goals import (
    CAPACITY,
    FLEET,
    GROUND,
    MEASURED,
    MEASURED_TOO,
    MODEL,
    UNMEASURED,
    at_load,
    blind,
    found,
    ours,
    per_replica,
    uneven,
)

NOISE = 0.005  # of goodput, a share
SILENT = [Fault(10.0, member.id, "stop polls") for member in FLEET.members]

both = pytest.mark.parametrize("options", [MEASURED_TOO, UNMEASURED], ids=["measured", "unmeasured"])


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
    # In a minute of such load a rung is free for ten seconds only by chance.
    assert dwell_seconds > 3 or sum(map(len, returns.values())) > 0, "the wave never makes a gate return"
    assert all(later - before >= dwell_seconds for each in returns.values() for before, later in pairwise(each))
    assert set(returns) <= {"bf16", "int8"}  # the last rung can't spill


def test_a_slow_wave_costs_no_goodput() -> None:
    """A load around the capacity with a period of three dwell times: good answers, and few changes of variant."""
    spill = Spill(after_seconds=1.0, return_below_seconds=0.25, dwell_seconds=20.0)
    figures = found(ours(wave(GROUND, seed=4), Options(spill=spill)))
    assert figures.alias_switches <= 2 * 2 * 60 / spill.dwell_seconds  # two gates open and close once a dwell time
    assert figures.good_share > 0.99
    assert figures.session_switches < 0.5


# Conversations

OF_FOUR = Ground(fleet_of(MODEL, {"bf16": 1, "int8": 1, "int4": 2}), 2.19, 200.0)


@pytest.mark.parametrize("options", [Options(), Options(named=False)], ids=["named", "unnamed"])
@pytest.mark.parametrize("times", [1.0, 1.5, 2.0])
def test_conversations_keep_their_precision(times: float, options: Options) -> None:
    """Of the turns that follow another one at most 5 % change it, and as many answers are good as ever."""
    figures = found(ours(steady(OF_FOUR, times, 1), options))
    assert figures.changed_share <= 0.05
    assert figures.good_share >= 1 - NOISE
    assert figures.shares["bf16"] > figures.shares["int8"] > figures.shares["int4"]


def test_conversations_return_when_their_rung_is_free() -> None:
    """After a minute of overload: whoever asks again a minute later is answered by the best rung."""
    mix = replace(CHATS, think_seconds=40.0)
    load = conversations(lambda now: 5.0 if now < 60 else 0.2, 5.0, 300.0, mix=mix, seed=4)
    run = ours(Scenario(OF_FOUR.fleet, load, 300.0))
    went_down = {each.turn.session for each in run.outcomes if each.asked_at < 60 and each.precision != "bf16"}
    later = [each.precision for each in run.outcomes if each.asked_at > 120 and each.turn.session in went_down]
    assert len(later) >= 5
    assert set(later) == {"bf16"}


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


def test_a_burst_of_the_same_prompt_spreads_over_two_replicas() -> None:
    """The busier replica of the best rung gets at most 1.3 times the mean."""
    assert found(ours(burst_of_one_prompt(FLEET))).spread <= 1.3
