"""The driver of rollouts: phases from the record, killed at every transition, two operators, undo."""

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.rollout.administration import GatewayOperator
from gateway.rollout.machine import FINAL, Event, Phase
from gateway.rollout.operating import GateRefused, Replacement
from gateway.rollout.plan import PlanSettings
from gateway.rollout.progress import NO_FAILED_STARTS
from gateway.rollout.revision import in_force
from serving.errors import RolloutExists
from serving.replica import Replica, ReplicaStatus, State
from serving.state.rollout_records import Demand
from tests.gateway.fleet import CONFIG
from tests.gateway.rollout.driving import FAST, RolloutFixture, rollout_fixture

WHOLE = [
    *("start", "verified", "ready", "checked", "step_done", "step_done", "passed", "deadline", "deadline"),
]


async def test_a_whole_rollout(state: str) -> None:
    """Every transition is recorded in order, with the weight that it set."""
    async with rollout_fixture(state) as scene:
        scene.start()
        assert await scene.end() is Phase.DONE
        assert scene.events() == WHOLE
        assert scene.weights() == [0.0, 0.1, 0.5, 1.0, 1.0, 0.0]
        assert scene.operator.ladder("smol") == ("odd", "lo")
        assert scene.snapshot().demands == (
            Demand("hi", "odd", False, scene.record.id),
            Demand("odd", "hi", True, scene.record.id),
        )
        assert scene.rollbacks == []


@pytest.mark.parametrize("number", range(len(WHOLE)))
async def test_a_driver_killed_after_each_transition(state: str, number: int) -> None:
    """Another one goes on from the record: the same story, told once, and no half state."""
    async with rollout_fixture(state) as scene:
        scene.start()
        await scene.until(lambda: len(scene.events()) > number, seconds=5.0)
        await scene.kill()
        assert scene.record.phase == scene.phase()
        if scene.phase() not in FINAL:
            assert await scene.end() is Phase.DONE
        assert scene.events() == WHOLE
        times = [entry.at for entry in scene.log()]
        assert times[1:] == sorted(times[1:])


@pytest.mark.parametrize("number", range(4, 9))
async def test_a_driver_killed_on_the_way_back(state: str, number: int) -> None:
    """A rollout that fails goes back whoever drives it; the gates' evidence is read again, and says the same."""
    async with rollout_fixture(state) as scene:
        scene.start()
        for _ in range(number):
            await scene.step(5.0)
            if scene.phase() is Phase.CANARY:
                scene.see(canary_errors=8)
        await scene.kill()
        assert await scene.end(canary_errors=8) is Phase.ROLLED_BACK
        assert scene.rollout.failure.startswith("errors: canary")
        assert scene.operator.ladder("smol") == ("hi", "lo")
        assert scene.weights()[-1] == 0.0
        assert Demand("odd", "hi", False, scene.record.id) in scene.snapshot().demands


async def test_a_driver_that_was_slow_writes_nothing(state: str) -> None:
    """Its lease has gone to another one: its fencing number is refused."""
    async with rollout_fixture(state) as scene:
        scene.start()
        slow = scene.driver
        await scene.step()
        scene.driver = scene._driver()
        scene.now += 11
        await scene.step(count=3)
        phase = scene.phase()
        await slow.drive()
        assert slow.jobs == {}
        assert scene.phase() is phase
        slow.context.link.close()


async def test_two_operators(state: str) -> None:
    """One wins, the other learns who; when the first rollout has ended, another may start from every final state."""
    async with rollout_fixture(state) as scene:
        first = scene.start()
        with pytest.raises(RolloutExists, match=rf"anna already runs rollout {first.id} of smol \(phase preflight\)"):
            scene.start()
        scene.steer(Event.ABORT, "wrong one")
        assert scene.phase() is Phase.FAILED
        second = scene.retry()
        assert second.id != first.id
        scene.smoke.result = ("smoke test 'greeting': the answer is empty",)
        assert await scene.end() is Phase.ROLLED_BACK
        assert scene.rollout.failure == "smoke test 'greeting': the answer is empty"
        scene.now += 1
        with pytest.raises(GateRefused, match=r"odd failed in rollout r-\w+: smoke test .*`quantgate rollout retry`"):
            scene.start()
        scene.smoke.result = ()
        scene.retry()
        assert await scene.end() is Phase.DONE
        assert scene.rollbacks == [("smol", "smoke")]


async def test_undo_after_a_rollout(state: str) -> None:
    """To the revision before, at once; it needs a variant that is ready."""
    async with rollout_fixture(state, replicas=[{"variant": "hi", "url": "http://127.0.0.1:9"}]) as scene:
        scene.start()
        await scene.end()
        with pytest.raises(Exception, match="has a ready replica: nothing would answer"):
            scene.operator.undo("smol", None, "")
        assert scene.operator.ladder("smol") == ("odd", "lo")


def running(scene: RolloutFixture) -> set[str]:
    """The variants that supervisors run."""
    return {each.variant for each in in_force(scene.configured, scene.snapshot()).settings.replicas}


@pytest.mark.parametrize("first, second", [("smol", "other"), ("other", "smol")])
async def test_two_rollouts_of_one_variant(state: str, first: str, second: str) -> None:
    """Whichever goes back first, the replicas run until the other one does not need them, either."""
    async with rollout_fixture(state, replicas=[{"variant": name} for name in ("hi", "mid")]) as scene:
        for scene.alias, old in (("smol", "hi"), ("other", "mid")):
            scene.start("odd", old)
            await scene.reach(Phase.CANARY)
        for scene.alias, expected in ((first, {"hi", "mid", "odd"}), (second, {"hi", "mid"})):
            scene.steer(Event.ABORT)
            await scene.reach(Phase.ROLLED_BACK)
            assert running(scene) == expected


async def test_a_variant_that_another_rollout_keeps(state: str) -> None:
    """It is in no ladder after the promotion, and runs to the end of `keep`."""
    aliases = {"smol": {"ladder": ["hi", "lo"]}, "other": {"ladder": ["hi"]}}
    replicas = [{"variant": name} for name in ("hi", "mid")]
    async with rollout_fixture(state, aliases=aliases, replicas=replicas) as scene:
        scene.start(keep=1e6)
        await scene.reach(Phase.KEEPING)
        scene.alias = "other"
        scene.start("mid", "hi", keep=0)
        await scene.reach(Phase.DONE)
        assert running(scene) == {"hi", "mid", "odd"}
        scene.now += 1e6
        scene.alias = "smol"
        await scene.end()
        assert running(scene) == {"mid", "odd"}


def adapted(*ladders: list[str]) -> dict[str, Any]:
    """Aliases with these ladders, where `hi` has the adapter `law`."""
    variants = {**CONFIG["variants"], "hi": {**CONFIG["variants"]["hi"], "lora": {"law": {}}}}
    aliases = {name: {"ladder": ladder} for name, ladder in zip(("smol", "tuned"), ladders, strict=False)}
    replicas = [{"variant": name, "kubernetes": {"service": name}} for name in ("hi", "odd")]
    return {"variants": variants, "aliases": aliases, "replicas": replicas}


async def test_an_adapter_of_another_alias(state: str) -> None:
    """The base stays, because it serves the adapter."""
    async with rollout_fixture(state, **adapted(["hi", "lo"], ["hi-law"])) as scene:
        scene.start()
        assert await scene.end() is Phase.DONE
        assert {each.variant for each in scene.snapshot().demands} == {"odd"}


async def test_an_adapter_that_is_replaced(state: str) -> None:
    """The replicas that leave are those of its base; `undo` wants them back."""
    async with rollout_fixture(state, "hi-law", "odd", **adapted(["hi-law"])) as scene:
        rollout = scene.start("odd", "hi-law").id
        assert await scene.end() is Phase.DONE
        assert scene.snapshot().demands == (Demand("hi", "odd", False, rollout), Demand("odd", "hi", True, rollout))
        ready = frozenset(scene.configured.variants)
        GatewayOperator(scene.configured, scene.database, "anna", lambda: scene.now, ready).undo("smol", None, "")
        assert [each.run for each in scene.snapshot().demands if each.variant == "hi"] == [True]
        assert {each.variant for each in scene.snapshot().demands} == {"hi", "odd"}


async def test_a_replica_that_comes_later(state: str) -> None:
    """A rollout waits for the address of the new variant, and goes back if it never comes."""
    async with rollout_fixture(state, "hi", "lo") as scene:
        scene.start(start_seconds=100)
        await scene.step(5.0, count=5)
        assert scene.phase() is Phase.STARTING
        scene.put("odd", State.WARMING)
        await scene.step(5.0)
        assert scene.phase() is Phase.STARTING
        scene.put("odd")
        await scene.step(5.0)
        assert scene.phase() is Phase.SMOKE


async def test_a_variant_that_does_not_start(state: str) -> None:
    """Its rollout goes back with the reason when its supervisor gives up, and not at the deadline an hour later."""
    async with rollout_fixture(state, "hi", "lo") as scene:
        scene.start()
        scene.put("odd", State.STARTING)
        await scene.step(5.0, count=4)
        scene.put("odd", State.FAILED, "golden prompt: wrong results")
        await scene.step(5.0, count=3)
        assert scene.phase() is Phase.STARTING
        scene.put("odd", State.WARMING)
        await scene.step(5.0)
        scene.registry.remove("odd-1")
        await scene.step(5.0, count=2)
        assert scene.phase() in (Phase.ROLLING_BACK, Phase.ROLLED_BACK)
        assert scene.rollout.failure == "odd does not start: golden prompt: wrong results"
        assert await scene.end() is Phase.ROLLED_BACK
        assert scene.rollbacks == [("smol", "starting")]


@pytest.mark.parametrize(
    "looks, most",
    [
        ([{"a": State.STARTING}, {"a": State.WARMING}, {"a": State.READY}], 0),
        ([{"a": State.STARTING}, {"a": State.FAILED}, {"a": State.FAILED}, {"a": State.STARTING}], 1),
        ([{"a": State.STARTING}, {"a": State.FAILED}, {"a": State.STARTING}, {"a": State.FAILED}], 2),
        ([{"a": State.STARTING}, {"a": State.FAILED}, {}], 1),  # once, also if it goes then
        ([{"a": State.STARTING}, {"a": State.FAILED}, {"a": State.WARMING}, {}], 2),  # its supervisor gave up
        ([{"a": State.STARTING}, {}, {"a": State.STARTING}, {"a": State.READY}], 1),  # its supervisor was restarted
        ([{"a": State.READY}, {}], 0),
        ([{"a": State.DRAINING}, {}], 0),  # of an earlier rollout
        # Each of two replicas may fail once; those that other programs run are waited for.
        ([{"a": State.STARTING, "b": State.STARTING}, {"a": State.FAILED, "b": State.FAILED}], 1),
        ([{"a": State.FAILED, "b": State.FAILED}, {"a": State.FAILED, "b": State.FAILED}], 0),
    ],
)
def test_failed_starts(looks: list[dict[str, State]], most: int) -> None:
    """A start that fails counts once, and so does a replica that goes while it starts."""
    starts = NO_FAILED_STARTS
    for look in looks:
        starts = starts.after(
            [
                ReplicaStatus(Replica(name, "odd", "bf16", "http://127.0.0.1:9", "odd"), state, "why", 0.0, 0)
                for name, state in look.items()
            ]
        )
    assert starts.most == most


async def test_a_variant_that_dies_after_promotion(state: str) -> None:
    """Back is the other way there: the old one, kept warm, takes over; without it nothing changes."""
    async with rollout_fixture(state) as scene:
        scene.start()
        await scene.reach(Phase.KEEPING)
        scene.put("odd", State.FAILED)
        scene.put("hi", State.FAILED)
        await scene.step(10.0, count=6)
        assert scene.phase() is Phase.HOLDING
        assert scene.operator.ladder("smol") == ("hi", "odd", "lo")
        scene.put("hi")
        assert await scene.end() is Phase.ROLLED_BACK
        assert scene.operator.ladder("smol") == ("hi", "lo")


async def test_hooks_are_told_in_order_and_never_block(state: str, tmp_path: Path) -> None:
    """Each transition is told once; a hook that fails is noted in the log, and the rollback goes on."""
    seen = tmp_path / "seen"
    hooks = [{"command": ["sh", "-c", f"cat >> {seen}; echo >> {seen}"]}, {"command": ["false"], "events": ["failed"]}]
    async with rollout_fixture(state) as scene:
        scene.smoke.result = ("bad",)
        scene.start(hooks=hooks)
        assert await scene.end() is Phase.ROLLED_BACK
        await scene.step(count=4)
        told = [json.loads(line) for line in seen.read_text().splitlines()]
        assert [each["event"] for each in told] == ["start", "verified", "ready", "failed", "drained"]
        assert told[3]["why"] == "bad"
        failed = [each for each in scene.database.entries("smol") if each.event == "hook_failed"]
        assert [each.why for each in failed] == ["false: exit code 1: "]


async def test_a_change_of_ladder(state: str) -> None:
    """Adding a rung is a rollout too: the canary's conversations have the new ladder."""
    async with rollout_fixture(state) as scene:
        plan = scene.operator.plan(Replacement("smol", ladder=("hi", "odd", "lo")), PlanSettings(**FAST))
        assert (plan.old, plan.new, plan.canary) == ("lo", "odd", ("hi", "odd", "lo"))
        scene.operator.start(plan, "one more rung")
        assert await scene.end() is Phase.DONE
        assert scene.operator.ladder("smol") == ("hi", "odd", "lo")
        assert {demand.variant for demand in scene.snapshot().demands if not demand.run} == set()


async def test_a_routing_fault_pauses(state: str) -> None:
    """Shares that are not the lottery's judge no variant: an operator looks."""
    async with rollout_fixture(state) as scene:
        scene.start()
        await scene.reach(Phase.CANARY)
        for _ in range(3):
            scene.see(canary=600, stable=60)
        await scene.step(5.0)
        assert scene.phase() is Phase.PAUSED
        assert "sample-ratio mismatch" in scene.rollout.pause
        assert scene.rollout.failure == ""
