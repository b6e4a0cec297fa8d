"""Several gateways in front of one fleet, simulated: they do hardly worse than one that sees everything."""

from dataclasses import replace

import pytest

from tests.benchmarks.routing.calibration import measured
from tests.benchmarks.routing.figures import Figures, Objective, figures_of
from tests.benchmarks.routing.fleet import Size, fleet_figures
from tests.benchmarks.routing.profiles import MODELS, fleet_of
from tests.benchmarks.routing.scenarios import Ground, steady
from tests.benchmarks.routing.several import run_several
from tests.benchmarks.routing.workloads import CHATS

FLEET = fleet_of("32b", {"bf16": 8, "int4": 4})
# Turns a second at which 95 % of first tokens of the best rung come in time, with two replicas of it: RESULTS.md.
CAPACITY_OF_TWO = 4.44
GROUND = Ground(FLEET, 4 * CAPACITY_OF_TWO, 60.0, replace(CHATS, mean_turns=3.0))
OBJECTIVE = Objective()


def figures(count: int, times: float, on_a_node: int = 1) -> Figures:
    """Run so many gateways at a load in multiples of the best rung."""
    measurements = {rung: measured(MODELS["32b"][rung]) for rung in FLEET.rungs}
    run = run_several(steady(GROUND, times, 1), measurements, count, str(count), on_a_node)
    return figures_of(run, OBJECTIVE)


@pytest.mark.parametrize("on_a_node", [1, 4])
def test_four_gateways_beside_one(on_a_node: int) -> None:
    """Good answers within 1 % of it, prefix hits within 5 %."""
    one, four = figures(1, 0.9), figures(4, 0.9, on_a_node)
    assert four.good_share >= one.good_share - 0.01
    assert four.hit_share >= 0.95 * one.hit_share
    assert (one.answered, four.answered) == (one.turns, four.turns)


def test_a_fleet_of_several_aliases() -> None:
    """Every turn is answered, and figures of decisions, polls, database and memory are there."""
    found = fleet_figures(Size(aliases=3, gateways=2, turns_per_second=60.0, seconds=4.0), OBJECTIVE)
    assert found.figures.answered == found.figures.turns > 100
    assert 0 < found.decision_p50 <= found.decision_p99
    assert found.polls_per_second_of_replica > 0
    # Two followers look four times a second and acknowledge every two seconds; four supervisors publish as often.
    assert found.queries_per_second == 2 * (2 * 4 + 3 / 2) + 4 * 9 / 2
    assert found.memory_full_bytes > found.memory_at_rest_bytes > 0
    assert found.spread >= 1
