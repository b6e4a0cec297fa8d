"""Any order of asking, ending, leaving and coming: nobody is lost, nobody is served twice, nothing is left."""

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from config.schema import QueueSettings
from gateway.errors import Overloaded, Unavailable
from gateway.proxy.leases import Lease
from gateway.routing.request import Ask
from gateway.routing.speed import SpeedProfile
from serving.replica import State
from tests.gateway.proxy.dispatching import HI, LO, House, end, house, settled

ROOM = 2
SPEED = SpeedProfile((0.025,), (40.0,), 0.001, 8)
NAMES = ("hi-0", "hi-1", "lo-0")
RUNGS = ((HI,), (LO,), (HI, LO))

ASK = st.tuples(st.just("ask"), st.sampled_from("abc"), st.sampled_from(RUNGS), st.sampled_from([0.5, 1000.0]))
END = st.tuples(st.just("end"), st.integers(0, 9), st.sampled_from(["succeeded", "failed", "refused", "abandoned"]))
LEAVE = st.tuples(st.just("leave"), st.integers(0, 9))
MOVE = st.tuples(
    st.just("move"), st.sampled_from(NAMES), st.sampled_from([State.READY, State.READY, State.STARTING, State.DRAINING])
)
GO = st.tuples(st.just("go"), st.sampled_from(NAMES))
PASS = st.tuples(st.just("pass"), st.sampled_from([0.1, 1.0, 40.0]))
SETTLE = st.tuples(st.just("settle"))
# Most of a story is about requests; `one_of` would take them all for equally likely.
WORDS = [ASK] * 8 + [END] * 5 + [LEAVE] * 3 + [SETTLE] * 3 + [MOVE, GO, PASS]
STORY = st.lists(st.sampled_from(WORDS).flatmap(lambda word: word), min_size=20, max_size=60)

Step = tuple[Any, ...]  # a word, and what belongs to it


class Story:
    """What has been asked, and which leases run."""

    def __init__(self, here: House) -> None:
        self.here = here
        self.tasks: list[asyncio.Task[Lease]] = []
        self.ended: list[Lease] = []

    @property
    def running(self) -> list[Lease]:
        """Leases that somebody has and hasn't ended."""
        got = [task.result() for task in self.tasks if task.done() and not task.cancelled() and not task.exception()]
        return [lease for lease in got if not any(lease is each for each in self.ended)]

    async def step(self, word: str, *rest: object) -> None:
        """Do one thing, and look whether everything is in order."""
        await getattr(self, f"_{word}")(*rest)
        assert all(count <= ROOM for count in self.here.load().values())

    async def _ask(self, key: str, rungs: tuple[object, ...], wait_seconds: float) -> None:
        prompt = Ask(prompt_tokens=300.0, session=key)
        self.tasks.append(self.here.ask(key, *rungs, wait_seconds=wait_seconds, prompt=prompt))  # type: ignore[arg-type]

    async def _end(self, number: int, how: str) -> None:
        if running := self.running:
            lease = running[number % len(running)]
            self.ended.append(lease)
            end(lease, how)

    async def _leave(self, number: int) -> None:
        if asking := [task for task in self.tasks if not task.done()]:
            asking[number % len(asking)].cancel()

    async def _move(self, name: str, state: State) -> None:
        self.here.come(name, state, ROOM)

    async def _go(self, name: str) -> None:
        self.here.registry.remove(name)

    async def _pass(self, seconds: float) -> None:
        """Let time pass; something that comes has everybody looked at, as the timer would."""
        self.here.now[0] += seconds
        self.here.come("odd-0", State.STARTING, reason=str(self.here.now[0]))

    async def _settle(self) -> None:
        await settled()
        assert sum(self.here.load().values()) == len(self.running)

    async def finish(self) -> None:
        """Let all that runs end, as long as anybody is served by it; then the replicas go."""
        await self._settle()
        while self.running:
            await self._end(0, "succeeded")
            await self._settle()
        await self._settle()
        for variant in self.here.registry.ready:
            assert not any(each.in_flight or each.ahead_seconds for each in self.here.loads.outlooks(variant))
        for name in NAMES:
            self.here.registry.remove(name)
        await self._settle()
        assert not self.running


@settings(max_examples=200, deadline=None)
@given(STORY)
def test_any_order(story: list[Step]) -> None:
    """In the end nothing is in flight, and everybody has had exactly one answer."""
    asyncio.run(told(story))


async def told(story: list[Step]) -> None:
    """Go through a story."""
    async with house(QueueSettings(per_alias=6, in_all=8), speeds={"hi": SPEED}) as here:
        here.come("hi-0", max_in_flight=ROOM)
        going = Story(here)
        for step in story:
            await going.step(*step)
        await going.finish()
        assert all(task.done() for task in going.tasks)
        errors = [task.exception() for task in going.tasks if not task.cancelled()]
        assert {type(error) for error in errors if error} <= {Overloaded, Unavailable}
        assert len({id(lease) for lease in going.ended}) == sum(error is None for error in errors)
