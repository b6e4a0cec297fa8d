"""Replicas that send nothing any more: who gets no requests, whose requests are taken away, and who comes back."""

import asyncio
import time
from math import inf

import pytest

from gateway.observability.metrics import Metrics
from gateway.proxy.dispatcher import Dispatcher
from gateway.proxy.load.tracker import LoadTracker
from gateway.proxy.silences import CHECK_SECONDS
from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.pick import decide
from serving.registry import Registry
from serving.replica import Replica, State
from tests.fakes.running import eventually
from tests.gateway.routing.clusters import request

pytestmark = pytest.mark.asyncio(loop_scope="session")


class RecordedExchanges:
    """Implements Exchanges: keeps what is abandoned, and when the last byte came."""

    def __init__(self) -> None:
        self.heard: dict[str, float] = {}
        self.abandoned: list[tuple[str, float]] = []

    def heard_at(self, replica: Replica) -> float:
        """What the test set."""
        return self.heard.get(replica.id, -inf)

    def abandon(self, replica: Replica, silent_seconds: float) -> None:
        """Keep it."""
        self.abandoned.append((replica.id, silent_seconds))


class Harness:
    """A dispatcher with replicas that answer polls as a test says, under a clock that it sets."""

    def __init__(self, *variants: str) -> None:
        self.offset = 0.0
        self.registry, self.exchanges = Registry(), RecordedExchanges()
        load = LoadTracker(self.registry.in_flight, {})
        self.dispatcher = Dispatcher(self.registry, load, Metrics(), clock=self.clock, exchanges=self.exchanges)
        for variant in variants:
            replica = Replica(f"{variant}-1", variant, "bf16", f"http://{variant}", "m1")
            self.registry.put(replica, State.READY)

    def clock(self) -> float:
        """The time of the gateway."""
        return time.monotonic() + self.offset

    def unanswered(self, replica_id: str, times: int, seconds: float) -> None:
        """Let polls time out, one after the other."""
        for _ in range(times):
            self.offset += seconds / times
            self.dispatcher.poll_answered(replica_id, False)

    def chosen(self) -> str | None:
        """The replica of the next request."""
        candidate = decide(request(), self.dispatcher.cluster, self.clock()).candidate
        return None if candidate is None else candidate.replica.id


async def test_a_silent_replica_gets_nothing_new() -> None:
    """Neither on its rung nor as a last resort while another one is there; it comes back with the next answer."""
    harness = Harness("hi", "lo")
    with harness.dispatcher:
        for name in ("hi-1", "lo-1"):
            harness.dispatcher.poll_answered(name, True)
        assert harness.chosen() == "hi-1"
        harness.unanswered("hi-1", 2, 2.0)
        assert harness.chosen() == "hi-1"
        harness.unanswered("hi-1", 2, 2.0)
        assert harness.chosen() == "lo-1"
        assert harness.exchanges.abandoned == []
        harness.dispatcher.poll_answered("hi-1", True)
        assert harness.chosen() == "hi-1"


async def test_a_replica_without_metrics_is_asked() -> None:
    """It has never answered a poll."""
    harness = Harness("hi", "lo")
    with harness.dispatcher:
        harness.unanswered("hi-1", 30, 60.0)
        assert harness.chosen() == "hi-1"
        assert harness.exchanges.abandoned == []


async def test_a_busy_replica_is_asked() -> None:
    """Its metrics come too late, but bytes of its responses come."""
    harness = Harness("hi", "lo")
    with harness.dispatcher:
        harness.dispatcher.poll_answered("hi-1", True)
        for _ in range(30):
            harness.exchanges.heard["hi-1"] = harness.clock()
            harness.unanswered("hi-1", 1, 1.0)
        assert harness.chosen() == "hi-1"
        assert harness.exchanges.abandoned == []


async def test_silent_replicas_are_a_last_resort() -> None:
    """They are asked if no other replica is there, until they hang."""
    harness = Harness("hi")
    with harness.dispatcher:
        harness.dispatcher.poll_answered("hi-1", True)
        harness.unanswered("hi-1", 4, 4.0)
        assert harness.chosen() == "hi-1"
        harness.unanswered("hi-1", 6, 6.0)
        assert harness.chosen() is None
        assert harness.exchanges.abandoned == [("hi-1", 0.0)]


async def test_a_request_that_waits_for_a_hung_replica() -> None:
    """It is served in the step in which the replica answers a poll again."""
    harness = Harness("hi")
    with harness.dispatcher as dispatcher:
        dispatcher.poll_answered("hi-1", True)
        harness.unanswered("hi-1", 10, 10.0)
        assert dispatcher.try_lease(request(), 9.0) is None
        waiting = asyncio.create_task(dispatcher.wait(request(), 9.0))
        await eventually(dispatcher.waiting)
        dispatcher.poll_answered("hi-1", True)
        (await waiting).release()


async def test_a_replica_is_found_to_hang_between_polls() -> None:
    """A poll may take longer than that: a timer looks, too, and ends."""
    harness = Harness("hi")
    with harness.dispatcher:
        harness.dispatcher.poll_answered("hi-1", True)
        harness.unanswered("hi-1", 3, 3.0)
        harness.offset += 7.0
        await eventually(lambda: harness.exchanges.abandoned)
        harness.dispatcher.poll_answered("hi-1", True)
        assert harness.dispatcher.cluster.silent == {}


async def test_a_silent_replica_that_fails_its_health_check() -> None:
    """Its requests are taken from it at once, if it has any."""
    harness = Harness("hi", "lo")
    with harness.dispatcher as dispatcher:
        lease = dispatcher.try_lease(request(), 9.0)
        assert lease is not None
        for name in ("hi-1", "lo-1"):
            dispatcher.poll_answered(name, True)
            harness.unanswered(name, 4, 4.0)
            harness.registry.move(name, State.FAILED)
        assert harness.exchanges.abandoned == [("hi-1", 0.0)]
        lease.release()


async def test_a_busy_replica_that_fails_its_health_check() -> None:
    """Its streams go on; those that stop for as long as a hung replica's are ended, until it has none."""
    harness = Harness("hi")
    with harness.dispatcher as dispatcher:
        lease = dispatcher.try_lease(request(), 9.0)
        assert lease is not None
        dispatcher.poll_answered("hi-1", True)
        harness.registry.move("hi-1", State.FAILED)
        assert harness.exchanges.abandoned == []
        await eventually(lambda: ("hi-1", 10.0) in harness.exchanges.abandoned)
        lease.release()
        await eventually(lambda: dispatcher._silences._timer is None)
        assert CHECK_SECONDS < 1


@pytest.mark.parametrize("state", [State.DRAINING, State.STOPPING])
async def test_a_replica_that_leaves_keeps_its_requests(state: State) -> None:
    """It finishes them."""
    harness = Harness("hi")
    with harness.dispatcher as dispatcher:
        lease = dispatcher.try_lease(request(), 9.0)
        assert lease is not None
        dispatcher.poll_answered("hi-1", True)
        harness.unanswered("hi-1", 4, 4.0)
        harness.registry.move("hi-1", state)
        assert harness.exchanges.abandoned == []
        assert dispatcher._silences._timer is not None
        lease.release()


async def test_polls_that_tell_nothing_are_answers() -> None:
    """What cannot be used has been answered all the same."""
    harness = Harness("hi")
    with harness.dispatcher as dispatcher:
        dispatcher.polled("hi-1", harness.clock(), EngineMetrics(harness.clock(), 0.0, 0.0))
        for _ in range(9):
            harness.offset += 1.0
            dispatcher.poll_failed("hi-1")
            dispatcher.poll_answered("hi-1", True)
        assert harness.chosen() == "hi-1"
