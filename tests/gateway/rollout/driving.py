"""Drivers on a clock of the test, over a real state database; evidence is written as workers would."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from gateway.deployment import Deployment
from gateway.rollout.collection import Collection, Outcome
from gateway.rollout.controller import Driver, DriverContext
from gateway.rollout.lottery import Arm, Draw
from gateway.rollout.machine import FINAL, Event, Phase, RolloutState
from gateway.rollout.operating import Operator, Replacement
from gateway.rollout.plan import GATE_NAMES, PlanSettings
from gateway.rollout.record import read_plan, read_state
from serving.registry import Registry
from serving.replica import Replica, State
from serving.state.database import StateDatabase
from serving.state.link import Link
from serving.state.rollout_records import BlockRecord, LogEntry, RolloutRecord, RolloutSnapshot
from serving.state.rollouts import RolloutDatabase
from tests.gateway.fleet import deployment

ONLY_ERRORS = tuple(name for name in GATE_NAMES if name != "errors")
FAST: dict[str, Any] = {
    "skip": ONLY_ERRORS,
    "step_seconds": 30,
    "steps": (10, 50, 100),
    "keep": 120,
    "drain_seconds": 60,
}
ALIASES = {"smol": {"ladder": ["hi", "lo"]}, "other": {"ladder": ["mid"]}}


@dataclass
class Smoke:
    """A smoke test with a fixed result."""

    result: tuple[str, ...] = ()

    async def problems(self, new: Replica, old: Replica | None) -> tuple[str, ...]:
        return self.result

    async def aclose(self) -> None:
        """There are no connections."""


@dataclass
class RolloutFixture:
    """An alias with its replicas, a clock, and a driver that may be killed and replaced."""

    state: str
    configured: Deployment
    now: float = 1_800_000_000.0
    monotonic: float = 0.0  # of what does not drive
    registry: Registry = field(default_factory=Registry)
    smoke: Smoke = field(default_factory=Smoke)
    requests: float = 0.0
    rollbacks: list[tuple[str, str]] = field(default_factory=list)
    alias: str = "smol"  # whose rollout is started, steered and looked at
    _drivers: int = 0
    _numbers: int = 0

    def __post_init__(self) -> None:
        self.database = RolloutDatabase(StateDatabase.at(self.state))
        self.operator = Operator(self.configured, self.database, "anna", lambda: self.now)
        self.database.revision()
        self.driver = self._driver()

    def _driver(self) -> Driver:
        self._drivers += 1
        context = DriverContext(
            Link(StateDatabase.at(self.state)),
            self.registry,
            lambda: self.configured,
            self.snapshot,
            lambda _: self.requests,
            f"driver-{self._drivers}",
            lambda alias, cause: self.rollbacks.append((alias, cause)),
            wall_clock=lambda: self.now,
        )
        return Driver(context, self.smoke)

    def snapshot(self) -> RolloutSnapshot:
        return self.database.snapshot()

    async def kill(self) -> None:
        """The driver dies: it gives nothing back; its lease expires, and another one goes on."""
        for job in self.driver.jobs.values():
            job.cancel()
        self.driver.context.link.close()
        self.driver = self._driver()
        self.now += 11

    def put(self, variant: str, state: State = State.READY, reason: str = "") -> None:
        self.registry.put(Replica(f"{variant}-1", variant, "bf16", "http://127.0.0.1:9", variant), state, reason)

    def start(self, new: str = "odd", old: str = "hi", **settings: Any) -> RolloutRecord:
        """Start a rollout of a variant in place of another one, by the clock of the test."""
        plan = self.operator.plan(Replacement(self.alias, new, old), PlanSettings(**{**FAST, **settings}))
        self.now += 1
        return self.operator.start(plan, "a test")

    def retry(self) -> RolloutRecord:
        self.now += 1
        return self.operator.retry(self.alias, "")

    @property
    def record(self) -> RolloutRecord:
        return self.operator.latest(self.alias)

    @property
    def rollout(self) -> RolloutState:
        return read_state(self.record)

    def phase(self) -> Phase:
        return self.rollout.phase

    async def step(self, seconds: float = 1.0, count: int = 1) -> None:
        for _ in range(count):
            self.now += seconds
            await self.driver.drive()
            await self._settle()

    async def _settle(self) -> None:
        """Let checks and hooks of this step end."""
        for job in tuple(self.driver.jobs.values()):
            for task in (job.check, job.hooks):
                if task is not None and not task.done():
                    await task

    async def until(self, look: Callable[[], object], steps: int = 200, seconds: float = 5.0, **evidence: Any) -> None:
        """Step, with evidence in each block, until something holds; AssertionError if it takes too long."""
        for _ in range(steps):
            if look():
                return
            if self.rollout.phase is Phase.CANARY:
                self.see(**evidence)
            await self.step(seconds)
        raise AssertionError(f"not reached: {self.rollout}")

    async def reach(self, phase: Phase, **evidence: Any) -> None:
        await self.until(lambda: self.rollout.phase is phase, **evidence)

    async def end(self, **evidence: Any) -> Phase:
        """Go on until a final phase."""
        await self.until(lambda: self.rollout.phase in FINAL, seconds=30.0, **evidence)
        return self.rollout.phase

    def see(self, canary: int = 60, stable: int = 60, canary_errors: int = 0, stable_errors: int = 0) -> None:
        """Write a block of time as a worker does."""
        state, collection = self.rollout, Collection()
        weights = self.start_weights
        if weights[state.step] == 1:
            return
        arms: tuple[tuple[Arm, int, int], ...] = (
            ("canary", round(canary * 2 * weights[state.step]), canary_errors),
            ("stable", round(stable * 2 * (1 - weights[state.step])), stable_errors),
        )
        for arm, count, errors in arms:
            for number in range(count):
                draw = Draw(number, arm, state.step, counts=True)
                collection.drawn(draw)
                collection.ended(draw, Outcome(frozenset({"errors"} if number < errors else ())))
        document = collection.take_block()
        if document is not None:
            self._numbers += 1
            block = BlockRecord(self.record.id, "worker", self._numbers, self.now, document.decode())
            self.database.add_evidence(self.record.id, [block], [])

    @property
    def start_weights(self) -> tuple[float, ...]:
        return read_plan(self.record).settings.weights

    def log(self) -> list[LogEntry]:
        return list(self.database.entries("smol", limit=1000, rollout=self.record.id))

    def events(self) -> list[str]:
        return [entry.event for entry in self.log()]

    def weights(self) -> list[float]:
        """The recorded weights, oldest first."""
        return [msgspec.json.decode(each.document)["weight"] for each in self.database.revisions("smol")][::-1]

    def steer(self, event: Event, why: str = "") -> RolloutState:
        return self.operator.steer(self.alias, event, why)


@asynccontextmanager
async def rollout_fixture(state: str, *ready: str, **tables: Any) -> AsyncIterator[RolloutFixture]:
    """An alias whose variants `ready` have replicas."""
    configured = replace(deployment({"aliases": ALIASES, "replicas": [], **tables}), state=state)
    made = RolloutFixture(state, configured)
    for variant in ready or ("hi", "lo", "mid", "odd"):
        made.put(variant)
    try:
        yield made
    finally:
        await made.driver.__aexit__(None, None, None)
        made.database.database.close()
