"""A whole rollout: a gateway with its driver, two fake replicas, and clients that go on talking."""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gateway.deployment import Deployment
from gateway.rollout.machine import Event, Phase
from gateway.rollout.operating import Operator, Replacement
from gateway.rollout.plan import GATE_NAMES, PlanSettings
from serving.errors import StateAway
from serving.state.database import StateDatabase
from serving.state.rollout_records import RolloutRecord
from serving.state.rollouts import RolloutDatabase
from tests.fakes.running import FakeReplica, eventually, running_fake
from tests.gateway.fleet import HELLO, Fleet, deployment, running_gateway
from tests.serving.state.databases import PostgreSQL, away

session_loop = pytest.mark.asyncio(loop_scope="session")
pytestmark = [pytest.mark.timeout(180)]
PATIENCE = 100.0
ONLY_ERRORS = tuple(name for name in GATE_NAMES if name != "errors")
FAST: dict[str, Any] = {"steps": (50, 100), "step_seconds": 1, "keep": 1, "drain_seconds": 1, "skip": ONLY_ERRORS}


@dataclass
class Stage:
    """A gateway with two replicas, and an operator."""

    fleet: Fleet
    operator: Operator
    old: FakeReplica
    new: FakeReplica
    answers: list[tuple[str, str, int]] = field(default_factory=list)  # conversation, variant, status

    def start(self, **settings: Any) -> RolloutRecord:
        plan = self.operator.plan(Replacement("smol", "odd", "hi"), PlanSettings(**{**FAST, **settings}))
        return self.operator.start(plan, "a test")

    async def reached(self, *phases: Phase) -> RolloutRecord:
        """The rollout, as soon as it is in one of these phases."""

        def look() -> RolloutRecord | None:
            with suppress(StateAway):
                record = self.operator.latest("smol")
                return record if record.phase in phases else None
            return None

        return await eventually(look, PATIENCE)

    async def ask(self, conversation: int, turns: int = 1) -> None:
        """Send the turns of one conversation."""
        messages: list[dict[str, str]] = [{"role": "user", "content": f"question {conversation}"}]
        for _ in range(turns):
            body = {"model": "smol", "messages": messages, "max_tokens": 64}
            answer = await self.fleet.ask(body)
            variant = answer.headers.get("x-quantgate-variant", "none")
            self.answers.append((str(conversation), variant, answer.status_code))
            if answer.status_code == 200:
                messages.append({"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"]})
                messages.append({"role": "user", "content": "and then?"})

    @asynccontextmanager
    async def load(self) -> AsyncIterator[None]:
        """Conversations, one after the other, while the block runs."""

        async def talk() -> None:
            number = 0
            while True:
                number += 1
                await self.ask(number, turns=2)

        task = asyncio.create_task(talk())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def events(self) -> list[str]:
        return [entry.event for entry in self.operator.database.entries("smol")]


def deployed(state: str, old: FakeReplica, new: FakeReplica) -> Deployment:
    replicas = [{"variant": "hi", "url": old.url}, {"variant": "odd", "url": new.url}]
    aliases = {"smol": {"ladder": ["hi", "lo"]}, "other": {"ladder": ["lo"]}}
    return replace(deployment({"replicas": replicas, "aliases": aliases}), state=state)


@asynccontextmanager
async def stage(state: str, *flags: str) -> AsyncIterator[Stage]:
    """A gateway before a rollout; `flags` are those of the new variant's replica."""
    async with running_fake() as old, running_fake(*flags) as new:
        made = deployed(state, old, new)
        operator = Operator(made, RolloutDatabase(StateDatabase.at(state)), "anna")
        operator.database.revision()
        async with running_gateway(made) as fleet:
            with fleet.replicas(("hi", old.url), ("odd", new.url)):
                yield Stage(fleet, operator, old, new)
        operator.close()


@session_loop
async def test_a_good_variant_reaches_everybody(state: str) -> None:
    """No request fails, no conversation moves, and the ladder is another one at the end."""
    async with stage(state) as scene:
        scene.start()
        async with scene.load():
            await scene.reached(Phase.DONE)
        assert {status for _, _, status in scene.answers} == {200}
        variants: dict[str, set[str]] = {}
        for conversation, variant, _ in scene.answers:
            variants.setdefault(conversation, set()).add(variant)
        assert all(len(used) == 1 for used in variants.values()), "a conversation moved"
        assert scene.events() == [
            *("start", "verified", "ready", "checked", "step_done", "passed", "deadline", "deadline"),
        ]
        assert scene.operator.ladder("smol") == ("odd", "lo")
        await scene.ask(10**6)
        assert scene.answers[-1][1] == "odd"


@session_loop
async def test_a_bad_variant_goes_back_by_itself(state: str) -> None:
    """Its errors are found by drawn arm, though every request was answered in the end by the old variant."""
    async with stage(state, "--fake-fail-first", "100000", "--fake-fail-status", "500") as scene:
        scene.start(skip=ONLY_ERRORS, smoke_seconds=60)
        record = await scene.reached(Phase.ROLLED_BACK)
        assert "smoke" in record.state
        assert scene.operator.ladder("smol") == ("hi", "lo")


@session_loop
async def test_alias_at_variant(state: str) -> None:
    """The new variant can be asked before any conversation is drawn to it; others cannot."""
    async with stage(state) as scene:
        scene.start(start_seconds=1)
        answers = Counter[int]()

        async def reachable() -> bool:
            answer = await scene.fleet.ask({**HELLO, "model": "smol@odd"})
            answers[answer.status_code] += 1
            return answer.status_code == 200 and answer.headers["x-quantgate-variant"] == "odd"

        assert await eventually(reachable)
        assert (await scene.fleet.ask({**HELLO, "model": "smol@mid"})).status_code == 404
        scene.operator.steer("smol", Event.ABORT, "enough")
        await scene.reached(Phase.ROLLED_BACK, Phase.FAILED)


@session_loop
async def test_damage_that_only_the_shadow_sees(state: str) -> None:
    """It answers as fast and as well-formed as the old variant; its log-probabilities are others."""
    async with stage(state, "--fake-logprob-shift", "-0.2") as scene:
        scene.start(shadow=1.0, shadow_requests=40)
        async with scene.load():
            record = await scene.reached(Phase.ROLLED_BACK)
        assert "shadow: 0.2000 nats per token" in record.state
        assert {variant for _, variant, _ in scene.answers} == {"hi"}
        assert "rolling_back" in [entry.phase for entry in scene.operator.database.entries("smol")]


@session_loop
async def test_a_variant_that_fails_for_clients_only(state: str) -> None:
    """What passes the smoke test and fails later is found by its errors, though the old one answers every request."""
    async with stage(state) as scene:
        scene.start(steps=(30, 50, 100), step_seconds=30)
        await scene.reached(Phase.CANARY)
        scene.new.process.send_signal(signal.SIGKILL)
        async with scene.load():
            record = await scene.reached(Phase.ROLLED_BACK)
        assert "errors: canary" in record.state
        assert {status for _, _, status in scene.answers} == {200}
        assert await scene.fleet.total("quantgate_rollout_rollbacks_total", cause="gate") == 1


@session_loop
async def test_the_database_is_away_in_the_middle(postgresql: PostgreSQL) -> None:
    """Both arms go on as recorded, /readyz and the metric say so, and the rollout goes on when it is back."""
    async with stage(postgresql.new_database()) as scene:
        scene.start(steps=(50, 100), step_seconds=5)
        await scene.reached(Phase.CANARY)
        async with scene.load():
            await eventually(lambda: {variant for _, variant, _ in scene.answers} == {"hi", "odd"}, PATIENCE)
            with away(postgresql, "stopped"):

                async def told() -> bool:
                    return "state" in (await scene.fleet.admin.get("/readyz")).json()

                await eventually(told, PATIENCE)
                assert await scene.fleet.total("quantgate_state_database_up") == 0
                assert (await scene.fleet.admin.get("/readyz")).status_code == 200
                before = len(scene.answers)
                await eventually(lambda: len(scene.answers) > before + 200, PATIENCE)
                assert {variant for _, variant, _ in scene.answers[before:]} == {"hi", "odd"}
            await scene.reached(Phase.DONE)
        assert {status for _, _, status in scene.answers} == {200}
        assert await scene.fleet.total("quantgate_state_database_up") == 1
