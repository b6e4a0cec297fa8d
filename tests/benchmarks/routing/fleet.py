"""A large fleet behind many gateways, in virtual time: costs of decisions, polls, memory, spread."""

import asyncio
import gc
import math
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from config.capacity import Measurement
from gateway.observability.metrics import Metrics
from gateway.proxy.dispatcher import Dispatcher
from gateway.proxy.load.tracker import LoadTracker
from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.prefix_index import MAX_BLOCKS_IN_ALL
from gateway.routing.request import RoutingRequest
from gateway.routing.sessions import MAX_SESSIONS
from gateway.routing.target import DEFAULT_SPILL
from serving.registry import Registry
from serving.replica import Replica, State
from serving.state.follower import BEAT_SECONDS, POLL_SECONDS
from tests.benchmarks.overhead.figures import percentile
from tests.benchmarks.routing.calibration import measured
from tests.benchmarks.routing.figures import Figures, Objective, figures_of
from tests.benchmarks.routing.ours import Options, Ours, targets_of
from tests.benchmarks.routing.policy import NOBODY, Decision
from tests.benchmarks.routing.profiles import MODELS, Fleet, fleet_of
from tests.benchmarks.routing.runs import Run, Scenario
from tests.benchmarks.routing.several import Gateways
from tests.benchmarks.routing.simulation import simulate
from tests.benchmarks.routing.workloads import CHATS, Lengths, Turn, constant, conversations

# Of the follower: one transaction for each look (a revision, the owners' heartbeats), and one for each acknowledgement.
HEARTBEAT_QUERIES, ACKNOWLEDGEMENT_QUERIES = 2, 3
PUBLISH_QUERIES = 9
# Short answers, so that a replica takes several turns a second.
SHORT_CHATS = replace(
    CHATS, asked=Lengths(120, 0.8, 2000), answered=Lengths(60, 0.6, 300), systems=(350, 90), think_seconds=2.0
)


@dataclass(frozen=True, slots=True)
class Size:
    """How large a fleet is, and how much is asked of it."""

    aliases: int = 100
    rungs: tuple[tuple[str, int], ...] = (("bf16", 5), ("int8", 3), ("int4", 2))
    gateways: int = 20
    turns_per_second: float = 5000.0
    seconds: float = 20.0
    model: str = "14b"

    @property
    def fleet(self) -> Fleet:
        """The replicas of all aliases."""
        return fleet_of(self.model, dict(self.rungs), self.aliases)


@dataclass(frozen=True, slots=True)
class FleetFigures:
    """What a large fleet came to; decisions are in microseconds of this machine, spread is the most by the mean.

    `queries_per_second` are those of the state database, of all gateways and supervisors, while no replica changes.
    """

    size: Size
    figures: Figures
    decision_p50: float
    decision_p99: float
    polls_per_second_of_gateway: float
    polls_per_second_of_replica: float
    queries_per_second: float
    memory_at_rest_bytes: int
    memory_full_bytes: int
    change_seconds: float
    restart_seconds: float
    spread: float


class Observed(Ours):
    """A gateway whose decisions are timed, and whose polls are counted."""

    def __init__(self, fleet: Fleet, measurements: Mapping[str, Measurement], options: Options) -> None:
        super().__init__(fleet, measurements, options)
        self._loop = asyncio.get_running_loop()
        self.decision_seconds: list[float] = []
        self.polls = 0

    async def choose(self, turn: Turn, now: float, tried: frozenset[str] = NOBODY) -> Decision:
        """Time decisions, without those that had to wait in a queue."""
        at, started = self._loop.time(), time.thread_time()
        decision = await super().choose(turn, now, tried)
        if self._loop.time() == at:
            self.decision_seconds.append(time.thread_time() - started)
        return decision

    def polled(self, replica: str, poll: EngineMetrics) -> None:
        """Count a poll."""
        self.polls += 1
        super().polled(replica, poll)


def fleet_figures(size: Size, objective: Objective) -> FleetFigures:
    """Simulate a large fleet, then measure the memory and the changes of one of its gateways."""
    fleet, options = size.fleet, Options()
    measurements = {rung: measured(MODELS[size.model][rung]) for rung in fleet.rungs}
    rate = size.turns_per_second
    asked = conversations(constant(rate), rate, size.seconds, mix=SHORT_CHATS)
    gateways: list[Observed] = []

    def make(scenario: Scenario) -> Gateways:
        gateways.extend(Observed(scenario.fleet, measurements, options) for _ in range(size.gateways))
        return Gateways(gateways, scenario.seed)

    run = simulate(Scenario(fleet, asked, size.seconds), make)
    costs = [1e6 * seconds for each in gateways for seconds in each.decision_seconds]
    seconds = max(outcome.ended_at or 0.0 for outcome in run.outcomes)
    polls = sum(each.polls for each in gateways) / seconds
    at_rest, full = memory_bytes(fleet)
    change, restart = change_seconds(fleet)
    return FleetFigures(
        size=size,
        figures=figures_of(run, objective),
        decision_p50=percentile(costs, 50),
        decision_p99=percentile(costs, 99),
        polls_per_second_of_gateway=polls / size.gateways,
        polls_per_second_of_replica=polls / len(fleet.members),
        queries_per_second=queries_per_second(size.gateways, supervisors=math.ceil(len(fleet.members) / 8)),
        memory_at_rest_bytes=at_rest,
        memory_full_bytes=full,
        change_seconds=change,
        restart_seconds=restart,
        spread=_spread(run),
    )


def queries_per_second(gateways: int, supervisors: int) -> float:
    """Count what followers and supervisors ask of the state database while nothing changes."""
    follower = HEARTBEAT_QUERIES / POLL_SECONDS + ACKNOWLEDGEMENT_QUERIES / BEAT_SECONDS
    return gateways * follower + supervisors * PUBLISH_QUERIES / BEAT_SECONDS


def memory_bytes(fleet: Fleet) -> tuple[int, int]:
    """Allocate what one gateway knows of a fleet: at rest, and when its bounded memories are full."""
    gc.collect()
    tracemalloc.start()
    try:
        with _dispatcher(Registry(), _replicas(fleet)) as dispatcher:
            at_rest, _ = tracemalloc.get_traced_memory()
            _fill(dispatcher, fleet)
            full, _ = tracemalloc.get_traced_memory()
        return at_rest, full
    finally:
        tracemalloc.stop()


def change_seconds(fleet: Fleet) -> tuple[float, float]:
    """Time one change of state in a fleet, with all that follows it at once; and as many as there are replicas."""
    registry, replicas = Registry(), _replicas(fleet)
    with _dispatcher(registry, replicas):
        started = time.thread_time()
        registry.put(replicas[0], State.DRAINING)
        one = time.thread_time() - started
        started = time.thread_time()
        with registry.changing():
            for replica in replicas:
                registry.put(replica, State.FAILED)
        return one, time.thread_time() - started


def _replicas(fleet: Fleet) -> list[Replica]:
    return [Replica(each.id, each.variant, each.precision, f"http://{each.id}", "m") for each in fleet.members]


@contextmanager
def _dispatcher(registry: Registry, replicas: list[Replica]) -> Iterator[Dispatcher]:
    """A dispatcher whose replicas are ready and have been polled."""
    with registry.changing():
        for replica in replicas:
            registry.put(replica, State.READY)
    with Dispatcher(registry, LoadTracker(registry.in_flight), Metrics()) as dispatcher:
        for replica in replicas:
            dispatcher.polled(replica.id, time.monotonic(), EngineMetrics(0.0, 0.0, 0.0, 0.1, 200_000, 0.0, 0.0))
        yield dispatcher


def _fill(dispatcher: Dispatcher, fleet: Fleet) -> None:
    """Answer turns until sessions, the prefix index and the decision log are full."""
    targets, each = targets_of(fleet, DEFAULT_SPILL), MAX_BLOCKS_IN_ALL // MAX_SESSIONS
    for number in range(MAX_SESSIONS):
        target = targets[number % len(targets)]
        blocks = tuple([hash((number, block)) for block in range(each)])
        request = RoutingRequest(
            target, target.permitted, number, prompt_tokens=64.0 * each, blocks=blocks, session=f"{number:032x}"
        )
        lease = dispatcher.try_lease(request, 30.0)
        assert lease is not None, "every replica is idle"
        with lease:
            lease.succeeded()


def _spread(run: Run) -> float:
    """The most turns of a replica by the mean of its rung and alias; the median of those that have many."""
    sent = Counter(outcome.replica for outcome in run.outcomes if outcome.replica)
    groups: dict[str, list[int]] = {}
    for member in run.scenario.fleet.members:
        groups.setdefault(member.variant, []).append(sent[member.id])
    spreads = sorted(max(counts) * len(counts) / sum(counts) for counts in groups.values() if sum(counts) >= 100)
    return spreads[len(spreads) // 2] if spreads else 1.0
