"""Several gateways in front of one fleet: each with its own state, and every turn at any of them."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from config.capacity import Measurement
from gateway.proxy.load.polling import intervals_of
from gateway.routing.engine_metrics import EngineMetrics
from tests.benchmarks.routing.figures import Figures, Objective, figures_of
from tests.benchmarks.routing.ours import Options, Ours
from tests.benchmarks.routing.policy import NOBODY, Decision, MetricsReader, Usage
from tests.benchmarks.routing.profiles import Fleet, fleet_of
from tests.benchmarks.routing.runs import Run, Scenario
from tests.benchmarks.routing.scenarios import Ground, steady
from tests.benchmarks.routing.simulation import simulate
from tests.benchmarks.routing.workloads import Turn

# 25 times the fleet whose best rung's capacity is searched for.
BESIDE_TIMES, BESIDE_SECONDS, BESIDE_TURNS = 25, 120.0, 3.0
BESIDE_LOADS = (0.7, 1.0, 1.25)
WORKERS = 4


class Node:
    """Workers that share polls: one of them reads, and tells the others."""

    intervals = intervals_of(WORKERS)

    def __init__(self, workers: Sequence[Ours]) -> None:
        self._workers = workers

    def busy(self, replica: str) -> bool:
        return any(each.busy(replica) for each in self._workers)

    def polled(self, replica: str, poll: EngineMetrics) -> None:
        for each in self._workers:
            each.polled(replica, poll)

    def unanswered(self, replica: str, now: float) -> None:
        for each in self._workers:
            each.unanswered(replica, now)


class Gateways:
    """Gateways behind a load balancer that knows nothing of conversations; on nodes of so many, they share polls."""

    def __init__(self, gateways: Sequence[Ours], seed: int = 1, on_a_node: int = 1) -> None:
        self.name = f"{len(gateways)} gateways"
        self.gateways = gateways
        nodes = [gateways[first : first + on_a_node] for first in range(0, len(gateways), on_a_node)]
        self._readers: Sequence[MetricsReader] = gateways if on_a_node == 1 else [Node(node) for node in nodes]
        self._chance = random.Random(seed)
        self._asked: dict[int, Ours] = {}  # by turn

    async def choose(self, turn: Turn, now: float, tried: frozenset[str] = NOBODY) -> Decision:
        """Ask any gateway; the one that was asked before goes on with a turn that a replica has failed."""
        if not tried or turn.key not in self._asked:
            self._asked[turn.key] = self._chance.choice(self.gateways)
        return await self._asked[turn.key].choose(turn, now, tried)

    def would_take(self, turn: Turn, now: float) -> bool:
        return self._asked[turn.key].would_take(turn, now)

    def sent(self, turn: Turn, replica: str, now: float) -> None:
        self._asked[turn.key].sent(turn, replica, now)

    def first_token(self, turn: Turn, replica: str, now: float) -> None:
        self._asked[turn.key].first_token(turn, replica, now)

    def finished(self, turn: Turn, replica: str, usage: Usage, now: float) -> None:
        self._asked[turn.key].finished(turn, replica, usage, now)

    def failed(self, turn: Turn, replica: str, now: float) -> None:
        self._asked[turn.key].failed(turn, replica, now)

    def readers(self) -> Sequence[MetricsReader]:
        return self._readers

    def ready(self, replicas: Sequence[str], now: float) -> None:
        for gateway in self.gateways:
            gateway.ready(replicas, now)

    def switches(self) -> Sequence[float]:
        """When a gate of any gateway opened or closed."""
        return sorted(at for gateway in self.gateways for at in gateway.switches())


def beside_fleet(model: str) -> Fleet:
    """The 100 replicas that 8 gateways share."""
    return fleet_of(model, {"bf16": 2 * BESIDE_TIMES, "int8": BESIDE_TIMES, "int4": BESIDE_TIMES})


def beside_one(
    ground: Ground,
    measurements: Mapping[str, Measurement],
    objective: Objective,
    count: int = 8,
    loads: Sequence[float] = BESIDE_LOADS,
) -> dict[str, list[Figures]]:
    """Compare one gateway with several: in processes of their own, and as workers of which four share a node."""
    ground = replace(ground, mix=replace(ground.mix, mean_turns=BESIDE_TURNS))
    tables = {}
    for times in loads:
        scenario = steady(ground, times, 1)
        runs = [
            run_several(scenario, measurements, 1, "1 gateway"),
            run_several(scenario, measurements, count, f"{count} gateways"),
            run_several(scenario, measurements, count, f"{count} workers, {WORKERS} on a node", WORKERS),
        ]
        title = f"{count} gateways beside 1, {len(ground.fleet.members)} replicas: {times:g} times the best rung"
        tables[title] = [figures_of(run, objective) for run in runs]
    return tables


def run_several(
    scenario: Scenario, measurements: Mapping[str, Measurement], count: int, name: str, on_a_node: int = 1
) -> Run:
    """Run a scenario with so many gateways, of which those on one node share polls."""

    def make(it: Scenario) -> Gateways:
        return Gateways([Ours(it.fleet, measurements, Options()) for _ in range(count)], it.seed, on_a_node)

    return replace(simulate(scenario, make), policy=name)
