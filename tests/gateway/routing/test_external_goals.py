"""What an external model at the end of a ladder must and must not take, on simulated engines in virtual time."""

from dataclasses import replace

import pytest

from tests.benchmarks.routing.ours import Options
from tests.benchmarks.routing.profiles import fleet_of
from tests.benchmarks.routing.runs import Fault, Scenario
from tests.benchmarks.routing.scenarios import steady
from tests.gateway.routing.goals import CAPACITY, GROUND, MEASURED_TOO, MODEL, UNMEASURED, found, ours

COUNTS = {"bf16": 2, "int8": 1, "int4": 1}
ENDS_OUTSIDE = fleet_of(MODEL, {**COUNTS, "external": 1})
SHORT = replace(GROUND, fleet=ENDS_OUTSIDE, seconds=60.0)

both = pytest.mark.parametrize("options", [MEASURED_TOO, UNMEASURED], ids=["measured", "unmeasured"])


def at_load(times: float) -> Scenario:
    """A constant rate, in multiples of what the best rung takes."""
    return steady(SHORT, times, 1)


@both
@pytest.mark.parametrize("times", [0.7, 1.25])
def test_while_replicas_are_soon_enough_nothing_goes_outside(times: float, options: Options) -> None:
    """Although it would be the fastest of all, and its speed is unknown."""
    assert found(ours(at_load(times), options)).shares["external"] <= 0.005


@both
def test_under_more_than_all_of_them_take_it_gets_the_rest(options: Options) -> None:
    """Nothing is refused, nearly everything is in time, and replicas answer as much as they can in time."""
    bare, ended = fleet_of(MODEL, {"bf16": 2}), fleet_of(MODEL, {"bf16": 2, "external": 1})
    alone, mine = (found(ours(steady(replace(SHORT, fleet=fleet), 5.0, 1), options)) for fleet in (bare, ended))
    assert mine.refused == mine.failed == 0
    assert mine.good_share > max(alone.good_share + 0.2, 0.9)
    by_replicas = (1 - mine.shares["external"]) * mine.turns
    assert by_replicas >= 0.8 * alone.good_share * alone.turns
    assert mine.shares["external"] > 0.1


def test_it_answers_while_all_replicas_are_down() -> None:
    """And hands back what they can answer when they are there again."""
    replicas = [member.id for member in ENDS_OUTSIDE.members if member.precision != "external"]
    faults = [Fault(20.0, each, "kill") for each in replicas] + [Fault(40.0, each, "restart") for each in replicas]
    run = ours(replace(at_load(0.7), faults=faults))
    assert all(each.ended_at for each in run.outcomes if each.asked_at > 22)
    while_down = [each.precision for each in run.outcomes if 22 < each.asked_at < 39]
    after = [each.precision for each in run.outcomes if each.asked_at > 43]
    assert set(while_down) == {"external"}
    assert after.count("external") <= 0.02 * len(after)
    assert len(while_down) > 10 * 0.7 * CAPACITY
