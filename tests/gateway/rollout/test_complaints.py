"""What users of other rollout engines complain about, one test per line of that list, named after it.

Numbers and names are issues of Argo Rollouts, Flagger, KServe and Dynamo.
"""

from dataclasses import replace

import pytest

from gateway.rollout.collection import Collection
from gateway.rollout.lottery import Lottery
from gateway.rollout.machine import FINAL, Event, Phase, Readiness, Refused, advance, deadline
from gateway.rollout.operating import Replacement
from gateway.rollout.plan import PlanSettings
from gateway.rollout.preflight import fingerprint
from gateway.rollout.progress import Facts, Progress, next_event
from gateway.rollout.record import Happening, change_of, read_plan
from gateway.rollout.replica_use import ReplicaUse
from gateway.rollout.revision import in_force, ladder_in_force, read_revision
from serving.errors import LeaseLost, RolloutExists
from serving.replica import State
from serving.state.rollout_records import EMPTY
from tests.gateway.rollout.driving import FAST, rollout_fixture
from tests.gateway.rollout.plans import NOW, plan
from tests.gateway.rollout.test_machine import state as phase_state


async def test_1_no_data_is_no_failure_and_no_promotion(state: str) -> None:
    """argo#1905: without conversations a step waits, then pauses with what it misses, and goes on when they come."""
    async with rollout_fixture(state) as scene:
        scene.start(stall_seconds=60)
        await scene.reach(Phase.CANARY)
        await scene.step(50.0)
        assert scene.phase() is Phase.CANARY
        await scene.step(20.0)
        assert scene.phase() is Phase.PAUSED
        assert "20 more conversations of the canary" in scene.rollout.pause
        assert scene.weights()[-1] == 0.1
        scene.steer(Event.RESUME)
        assert await scene.end() is Phase.DONE


@pytest.mark.parametrize("paused", [True, False])
async def test_2_a_failed_analysis_ends_the_rollout_in_every_state(state: str, paused: bool) -> None:
    """argo#1411, flagger#1801: the fail check runs while a rollout is paused, too."""
    async with rollout_fixture(state) as scene:
        scene.start()
        await scene.reach(Phase.CANARY)
        if paused:
            scene.steer(Event.PAUSE, "lunch")
        for _ in range(12):
            await scene.step(5.0)
            scene_phase = scene.phase()
            if scene_phase in (Phase.CANARY, Phase.PAUSED):
                scene.see(canary_errors=10)
        assert scene.phase() in (Phase.ROLLING_BACK, Phase.ROLLED_BACK)
        assert scene.rollout.failure.startswith("errors: canary")


async def test_3_rollback_never_sends_traffic_to_what_is_not_ready(state: str) -> None:
    """argo#777, flagger#1898: the weight goes to 0 when the old variant is ready, and not before."""
    async with rollout_fixture(state) as scene:
        scene.start()
        await scene.reach(Phase.CANARY)
        scene.put("hi", State.FAILED)
        for _ in range(4):
            scene.see(canary_errors=10)
        await scene.step(5.0)
        assert scene.phase() is Phase.HOLDING
        assert scene.weights()[-1] == 0.1
        scene.put("hi")
        await scene.step(5.0)
        assert scene.phase() is Phase.ROLLING_BACK
        assert scene.weights()[-1] == 0.0


async def test_4_a_fix_forward_needs_no_stable_variant(state: str) -> None:
    """argo#1774, flagger#639: with the old variant dead, `promote --full` and a plan without comparison lead on."""
    async with rollout_fixture(state) as scene:
        scene.put("hi", State.FAILED)
        scene.start()
        await scene.reach(Phase.CANARY)
        # The command asks replicas itself; here, the registry's word is passed on.
        ready, record = Readiness(old=False, new=True), scene.record
        after = advance(scene.rollout, Event.PROMOTE_FULL, "broken", read_plan(record), ready, scene.now)
        assert after.phase is Phase.DRAINING
        scene.steer(Event.ABORT)
    async with rollout_fixture(state) as scene:
        assert scene.phase() is Phase.HOLDING


def test_4_a_plan_without_comparison_judges_no_gate() -> None:
    """The other way forward: gates that would compare with a broken variant decide nothing."""
    one = plan(compare=False, skip=[])
    progress = Progress(one)
    progress.gates = tuple(replace(gate, failed=True) for gate in progress.gates)
    progress.canary_by_step = {0: 100}
    canary = phase_state(Phase.CANARY)
    assert next_event(canary, one, progress, Facts(Readiness(old=False, new=True)), NOW + 301) is not None
    found = next_event(canary, one, progress, Facts(Readiness(old=False, new=True)), NOW + 301)
    assert found is not None
    assert found[0] is Event.STEP_DONE


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in FINAL])
def test_5_nothing_is_stuck_for_ever(phase: Phase) -> None:
    """argo#4128: every phase has a deadline, which its driver acts on."""
    one, began = plan(), phase_state(phase)
    late = deadline(began, one)
    found = next_event(began, one, Progress(one), Facts(Readiness(old=False, new=False)), late)
    assert found is not None
    assert found[0] in (Event.DEADLINE, Event.STALLED)
    advance(began, *found, one, Readiness(old=False, new=False), late)


async def test_6_something_new_during_a_rollout_waits(state: str) -> None:
    """argo#1372, flagger#30: one at a time; edits of the configuration take effect for the next one."""
    async with rollout_fixture(state) as scene:
        scene.start()
        await scene.reach(Phase.CANARY)
        with pytest.raises(RolloutExists):
            scene.start()
        edited = scene.configured.settings.aliases["smol"].model_copy(update={"ladder": ("mid",)})
        aliases = {**scene.configured.settings.aliases, "smol": edited}
        settings = scene.configured.settings.model_copy(update={"aliases": aliases})
        during = in_force(replace(scene.configured, settings=settings), scene.snapshot())
        assert during.settings.aliases["smol"].ladder == ("hi", "lo")
        assert await scene.end() is Phase.DONE
        after = in_force(replace(scene.configured, settings=settings), scene.snapshot())
        assert after.settings.aliases["smol"].ladder == ("mid",)


@pytest.mark.parametrize("how", ["failed", "rolled_back", "done"])
async def test_7_every_final_state_can_be_left(state: str, how: str) -> None:
    """flagger#1152, argo#3120: `retry`, or another variant, from each of them."""
    async with rollout_fixture(state) as scene:
        scene.start()
        if how == "failed":
            scene.steer(Event.ABORT)
        elif how == "rolled_back":
            scene.smoke.result = ("bad",)
            await scene.end()
        else:
            await scene.end()
        assert scene.phase() == how
        if how == "done":
            with pytest.raises(Refused, match="was completed"):
                scene.retry()
            scene.now += 1
            back = scene.operator.plan(Replacement("smol", "hi", "odd"), PlanSettings(**FAST))
            scene.operator.start(back, "back by a rollout")
            assert await scene.end() is Phase.DONE
            assert scene.operator.ladder("smol") == ("hi", "lo")
        else:
            scene.smoke.result = ()
            scene.retry()
            assert await scene.end() is Phase.DONE


async def test_8_a_restart_changes_no_weight(state: str) -> None:
    """argo#1665: weights come from the record alone, and a driver that was replaced cannot change them."""
    async with rollout_fixture(state) as scene:
        scene.start()
        await scene.reach(Phase.CANARY)
        before = scene.weights()
        await scene.kill()
        await scene.driver.drive()
        assert scene.weights() == before
        record = scene.record
        late = Happening(Event.STEP_DONE, "", "the dead one", scene.now)
        _, change = change_of(record, late, Readiness(old=True, new=True), ("hi", "lo"), ReplicaUse())
        with pytest.raises(LeaseLost):
            scene.database.change(record.id, record.version, change, "the dead one", scene.now, 1)


async def test_9_old_replicas_do_not_count_as_new_ones(state: str) -> None:
    """dynamo#3567: what counts is a replica of the plan's content, not of its name, and never a number."""
    async with rollout_fixture(state, "hi", "lo") as scene:
        scene.start()
        scene.put("hi")
        await scene.step(5.0, count=4)
        assert scene.phase() is Phase.STARTING
        scene.put("odd")
        changed = replace(scene.configured.variants["odd"], precision="int8")
        original = scene.configured
        scene.configured = replace(original, variants={**original.variants, "odd": changed})
        assert fingerprint(changed) != fingerprint(original.variants["odd"])
        await scene.step(5.0, count=4)
        assert scene.phase() is Phase.STARTING
        scene.configured = original
        await scene.step(5.0)
        assert scene.phase() is Phase.SMOKE


async def test_10_the_previous_revision_is_the_recorded_one(state: str) -> None:
    """kserve#2130: a revision is a record that is never changed, with its whole ladder; a ladder of unknown variants
    holds nothing.
    """
    async with rollout_fixture(state) as scene:
        scene.start()
        await scene.end()
        first, *_, last = [read_revision(each) for each in scene.database.revisions("smol")][::-1]
        assert (first.stable, first.canary, first.weight) == (("hi", "lo"), ("odd", "hi", "lo"), 0.0)
        assert (last.stable, last.canary) == (("odd", "lo"), None)
        assert ladder_in_force(("hi", "lo"), last, {"hi", "lo"}, active=False) == ("hi", "lo")
        assert in_force(scene.configured, EMPTY) is scene.configured


async def test_11_some_want_a_freeze(state: str) -> None:
    """flagger#1186: `on_fail: pause` keeps the weight, and an operator decides."""
    async with rollout_fixture(state) as scene:
        scene.start(on_fail="pause")
        await scene.reach(Phase.CANARY)
        for _ in range(4):
            scene.see(canary_errors=10)
        await scene.step(5.0, count=3)
        assert scene.phase() is Phase.PAUSED
        assert scene.weights()[-1] == 0.1
        assert scene.events().count("failed") == 1


def test_12_a_conversation_stays_with_its_generation() -> None:
    """dynamo#15214: by the recorded arm, whatever the weight becomes, also on a worker that learns of it."""
    lottery, other = Lottery("r-1", 0.05), Lottery("r-1", 0.05)
    collection = Collection()
    first = {}
    for number in range(2000):
        draw, new = lottery.draw(str(number), later=False)
        assert new
        collection.drawn(draw)
        first[str(number)] = draw.arm
    shared = [draw for _ in range(2) for draw in lottery.take_unshared()]
    other.learn((draw.conversation, draw.arm, draw.step) for draw in shared)
    for weight in (0.25, 0.5, 1.0, 0.0):
        lottery.weight = other.weight = weight
        assert {key: lottery.draw(key, later=True)[0].arm for key in first} == first
        assert {key: other.draw(key, later=True)[0].arm for key in first} == first
    assert 0.03 < collection.totals["canary"] / 2000 < 0.07
