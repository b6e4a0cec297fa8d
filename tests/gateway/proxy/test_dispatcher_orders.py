"""Any order of requests, ends, disconnects and replica changes: each request ends once, and nothing is left."""

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from config.schema import QueueSettings
from gateway.errors import Overloaded, QueueFull, QueueTimeout, Unavailable
from gateway.proxy.leases import Lease
from gateway.routing.speed import SpeedProfile
from serving.replica import State
from tests.gateway.proxy.dispatching import HI, LO, DispatcherHarness, end, running_dispatcher, settle

MAX_IN_FLIGHT = 2
SPEED = SpeedProfile((0.025,), (40.0,), 0.001, 8)
NAMES = ("hi-0", "hi-1", "lo-0")
LADDERS = ((HI,), (LO,), (HI, LO))

REQUEST = st.tuples(
    st.just("request"), st.sampled_from("abc"), st.sampled_from(LADDERS), st.sampled_from([0.5, 1000.0])
)
END = st.tuples(st.just("end"), st.integers(0, 9), st.sampled_from(["succeeded", "failed", "refused", "abandoned"]))
DISCONNECT = st.tuples(st.just("disconnect"), st.integers(0, 9))
MOVE = st.tuples(
    st.just("move"), st.sampled_from(NAMES), st.sampled_from([State.READY, State.READY, State.STARTING, State.DRAINING])
)
REMOVE = st.tuples(st.just("remove"), st.sampled_from(NAMES))
ADVANCE = st.tuples(st.just("advance"), st.sampled_from([0.1, 1.0, 40.0]))
SETTLE = st.tuples(st.just("settle"))
# Most steps are about requests; `one_of` would make all kinds equally likely.
KINDS = [REQUEST] * 8 + [END] * 5 + [DISCONNECT] * 3 + [SETTLE] * 3 + [MOVE, REMOVE, ADVANCE]
SEQUENCE = st.lists(st.sampled_from(KINDS).flatmap(lambda kind: kind), min_size=20, max_size=60)

Step = tuple[Any, ...]  # a kind, and its arguments


class Run:
    """The requests of one sequence, and their leases."""

    def __init__(self, harness: DispatcherHarness) -> None:
        self.harness = harness
        self.tasks: list[asyncio.Task[Lease]] = []
        self.ended: list[Lease] = []

    @property
    def running(self) -> list[Lease]:
        """Leases that have not ended."""
        done = [task for task in self.tasks if task.done() and not task.cancelled() and not task.exception()]
        leases = [task.result() for task in done]
        return [lease for lease in leases if not any(lease is each for each in self.ended)]

    async def step(self, kind: str, *arguments: object) -> None:
        """Take one step, and check that no replica has too many requests."""
        await getattr(self, f"_{kind}")(*arguments)
        assert all(count <= MAX_IN_FLIGHT for count in self.harness.in_flight().values())

    async def _request(self, key: str, variants: tuple[object, ...], wait_seconds: float) -> None:
        self.tasks.append(
            self.harness.start(key, *variants, wait_seconds=wait_seconds, prompt_tokens=300.0, session=key)  # type: ignore[arg-type]
        )

    async def _end(self, number: int, outcome: str) -> None:
        if running := self.running:
            lease = running[number % len(running)]
            self.ended.append(lease)
            end(lease, outcome)

    async def _disconnect(self, number: int) -> None:
        if waiting := [task for task in self.tasks if not task.done()]:
            waiting[number % len(waiting)].cancel()

    async def _move(self, name: str, state: State) -> None:
        self.harness.add(name, state, MAX_IN_FLIGHT)

    async def _remove(self, name: str) -> None:
        self.harness.registry.remove(name)

    async def _advance(self, seconds: float) -> None:
        """Advance the clock; a replica that is added has all queues served, as the timer would."""
        self.harness.now[0] += seconds
        self.harness.add("odd-0", State.STARTING, reason=str(self.harness.now[0]))

    async def _settle(self) -> None:
        await settle()
        assert sum(self.harness.in_flight().values()) == len(self.running)

    async def finish(self) -> None:
        """End all leases until no request is served any more; then remove the replicas."""
        await self._settle()
        while self.running:
            await self._end(0, "succeeded")
            await self._settle()
        await self._settle()
        for variant in self.harness.registry.ready:
            assert not any(each.in_flight or each.ahead_seconds for each in self.harness.load.estimates(variant))
        for name in NAMES:
            self.harness.registry.remove(name)
        await self._settle()
        assert not self.running


@settings(max_examples=200, deadline=None)
@given(SEQUENCE)
def test_any_order(sequence: list[Step]) -> None:
    """At the end nothing is in flight, and every request got exactly one lease or error."""
    asyncio.run(run(sequence))


async def run(sequence: list[Step]) -> None:
    """Run a sequence of steps."""
    async with running_dispatcher(QueueSettings(per_alias=6, in_all=8), speeds={"hi": SPEED}) as harness:
        harness.add("hi-0", max_in_flight=MAX_IN_FLIGHT)
        current = Run(harness)
        for step in sequence:
            await current.step(*step)
        await current.finish()
        assert all(task.done() for task in current.tasks)
        errors = [task.exception() for task in current.tasks if not task.cancelled()]
        assert {type(error) for error in errors if error} <= {Overloaded, QueueFull, QueueTimeout, Unavailable}
        assert len({id(lease) for lease in current.ended}) == sum(error is None for error in errors)
