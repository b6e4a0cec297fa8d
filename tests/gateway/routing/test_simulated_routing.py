"""What routing by precision must show, on the simulator: quality, goodput, floors and calm, with faults and without."""

from functools import cache

import pytest

from config.capacity import Measurement
from config.schema import Spill
from tests.benchmarks.routing import scenarios
from tests.benchmarks.routing.calibration import measured
from tests.benchmarks.routing.figures import Figures, Objective, figures_of
from tests.benchmarks.routing.ours import Options, Ours
from tests.benchmarks.routing.policies import CacheAware, Counting, LeastInFlight, LeastLoad, PowerOfTwo, RoundRobin
from tests.benchmarks.routing.profiles import MODELS, fleet_of
from tests.benchmarks.routing.runs import Scenario
from tests.benchmarks.routing.scenarios import Ground
from tests.benchmarks.routing.simulation import simulate

OBJECTIVE = Objective()
FLEET = fleet_of("32b", {"bf16": 2, "int8": 1, "int4": 1})
# Turns a second that the two best replicas take: what `scenarios.best_rung_capacity` finds.
GROUND = Ground(FLEET, capacity=4.4, seconds=150.0)
PEERS = (RoundRobin, LeastInFlight, PowerOfTwo, CacheAware, LeastLoad)


@cache
def measurements() -> dict[str, Measurement]:
    """As `quantgate measure` would write them."""
    return {rung: measured(MODELS["32b"][rung], requests=60) for rung in FLEET.rungs}


def ours(scenario: Scenario, options: Options | None = None) -> Figures:
    """What our policy makes of a scenario."""
    run = simulate(scenario, lambda it: Ours(it.fleet, measurements(), options or Options()))
    return figures_of(run, OBJECTIVE)


def peers(scenario: Scenario, *kinds: type[Counting]) -> list[Figures]:
    """What others make of it."""
    return [figures_of(simulate(scenario, lambda it, kind=kind: kind(it.fleet)), OBJECTIVE) for kind in kinds or PEERS]  # type: ignore[misc]


def test_nothing_spills_while_the_best_rung_is_enough() -> None:
    figures = ours(scenarios.steady(GROUND, 0.7, seed=1))
    assert (figures.agreement, figures.alias_switches, figures.session_switches) == (1.0, 0.0, 0.0)
    assert figures.good_share == 1.0


@pytest.mark.parametrize("times", [1.0, 1.25, 1.5])
def test_with_more_as_many_answers_are_good_as_with_any_peer_and_they_are_better(times: float) -> None:
    scenario = scenarios.steady(GROUND, times, seed=2)
    figures, others = ours(scenario), peers(scenario)
    assert figures.good_share >= max(each.good_share for each in others) - 0.005
    assert figures.agreement > max(each.agreement for each in others)
    assert figures.shares["bf16"] > figures.shares["int8"] >= figures.shares["int4"]


def test_without_measurements_it_learns() -> None:
    scenario = scenarios.steady(GROUND, 1.25, seed=3)
    figures = ours(scenario, Options(measured=False))
    assert figures.good_share >= max(each.good_share for each in peers(scenario)) - 0.02
    assert figures.agreement > max(each.agreement for each in peers(scenario))


def test_under_a_wave_a_gate_turns_no_more_often_than_its_dwell_lets_it() -> None:
    """Open for at least the dwell time: at most one opening and one closing in each."""
    spill = Spill(after_seconds=1.0, return_below_seconds=0.25, dwell_seconds=20.0)
    figures = ours(scenarios.wave(GROUND, seed=4), Options(spill=spill))
    assert figures.alias_switches <= 2 * 2 * 60 / spill.dwell_seconds  # two gates
    assert figures.good_share > 0.99
    assert figures.session_switches < 0.5


@pytest.mark.parametrize(
    "fault, least_good",
    [
        # What it had begun to answer is lost, whoever sent it.
        ("a best replica killed, back after 60 s", 0.96),
        ("a best replica 5 times slower than measured", 0.95),
        ("a best replica 5 times slower for 60 s", 0.97),
        ("no polls for 10 s", 0.98),
        ("num_requests_waiting renamed", 0.97),
    ],
)
def test_what_goes_wrong_costs_little_and_never_a_floor(fault: str, least_good: float) -> None:
    """One client in ten takes the best rung only: whatever happens, no other one answers it."""
    scenario = scenarios.faulty(GROUND, fault, seed=5)
    figures = ours(scenario)
    assert figures.below_floor == 0
    assert figures.good_share >= least_good
    assert all(each.below_floor > 0 for each in peers(scenario, LeastInFlight, CacheAware))


def test_more_than_all_rungs_take_is_refused_with_a_time_that_is_about_true() -> None:
    scenario = scenarios.steady(GROUND, 6.0, seed=6)
    figures = ours(scenario, Options(patience_seconds=OBJECTIVE.first_token_seconds))
    assert figures.refused > 100
    assert abs(figures.retry_error_seconds) < 5
    assert figures.below_floor == 0


def test_a_burst_of_the_same_prompt_spreads() -> None:
    assert ours(scenarios.burst(FLEET)).spread <= 1.3
