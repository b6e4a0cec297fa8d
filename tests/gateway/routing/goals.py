"""Scenarios of the routing goals."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

from config.capacity import Measurement
from tests.benchmarks.routing import policies
from tests.benchmarks.routing.calibration import measured
from tests.benchmarks.routing.figures import Figures, Objective, figures_of
from tests.benchmarks.routing.ours import Options, Ours
from tests.benchmarks.routing.profiles import MODELS, fleet_of
from tests.benchmarks.routing.runs import Outcome, Run, Scenario
from tests.benchmarks.routing.scenarios import Ground, steady
from tests.benchmarks.routing.simulation import simulate

MODEL = "32b"
FLEET = fleet_of(MODEL, {"bf16": 2, "int8": 1, "int4": 1})
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
