"""How many replicas a rollout wants of a workload, and which demands it carries out at all."""

import msgspec
import pytest

from gateway.rollout.record import changed_variants
from gateway.rollout.replica_use import ReplicaUse
from gateway.rollout.scaling import (
    SCALED,
    SCALING,
    UNDO,
    Scaling,
    ScalingLog,
    Step,
    replicas_after,
    shared_evenly,
    steps_of,
    still_to_set,
)
from serving.kubernetes.workloads import Workload
from serving.state.rollout_records import EMPTY, Demand, LogEntry, RolloutRecord, RolloutSnapshot
from tests.gateway.rollout.plans import plan

NEW, OLD = Workload("deployment", "new", "default"), Workload("deployment", "old", "default")
UP, BACK, AWAY = (
    Step(Demand("new", "old", True, "r-1"), NEW),
    Step(Demand("new", "old", False, "r-1"), NEW),
    Step(Demand("old", "new", False, "r-1"), OLD),
)
AGAIN = Step(Demand("old", "old", True, f"{UNDO}1"), OLD)
OTHER = Step(Demand("new", "old", True, "r-2"), NEW)
NOTHING = ReplicaUse()


def used(*variants: str) -> ReplicaUse:
    return ReplicaUse(frozenset(variants))


def entry(event: str, scaling: Scaling) -> LogEntry:
    return LogEntry("smol", 0.0, "gateway", event, "starting", "", msgspec.json.encode(scaling).decode())


def log_of(*scalings: Scaling) -> ScalingLog:
    return ScalingLog.of([entry(SCALING, scaling) for scaling in scalings])


def snapshot(*demands: Demand, active: tuple[str, ...] = ("r-1",)) -> RolloutSnapshot:
    records = [RolloutRecord(name, "smol", "", "", "starting", True, 0, "anna", 0.0) for name in active]
    return RolloutSnapshot("e", 1, tuple(records), EMPTY.aliases, demands)


@pytest.mark.parametrize(
    "step, now, history, model, before, after",
    [
        # Up: as many as the variant that is replaced, never fewer than there are, at least one.
        (UP, 0, log_of(), 3, 0, 3),
        (UP, 5, log_of(), 3, 0, 5),
        (UP, 0, log_of(), 0, 0, 1),
        (UP, 0, log_of(), None, 0, 1),
        # Down: as before, and no more than now.
        (AWAY, 3, log_of(), None, 0, 0),
        (BACK, 3, log_of(Scaling.of(UP, 2, 3)), None, 2, 2),
        (BACK, 1, log_of(Scaling.of(UP, 2, 3)), None, 2, 1),
        # Up for an undo: as many as were taken last.
        (AGAIN, 0, log_of(Scaling.of(AWAY, 3, 0)), None, 0, 3),
        (AGAIN, 4, log_of(Scaling.of(AWAY, 3, 0)), None, 0, 4),
        (AGAIN, 0, log_of(Scaling.of(UP, 0, 3)), None, 0, 1),
    ],
)
def test_the_number_of_replicas(
    step: Step, now: int, history: ScalingLog, model: int | None, before: int, after: int
) -> None:
    """See the comments."""
    assert replicas_after(step, now, history, model_replicas=model, before=before) == after


def test_the_first_entry_of_a_step_has_the_number_before() -> None:
    """A process that goes on after a crash must not take the changed number for the one before the rollout."""
    history = ScalingLog.of([entry(SCALING, Scaling.of(UP, 0, 3)), entry(SCALED, Scaling.of(UP, 3, 3))])
    assert history.begun[UP.key].before == 0
    assert history.done == {UP.key}
    assert ScalingLog.of([entry(SCALING, Scaling.of(UP, 0, 3))]).done == frozenset()


@pytest.mark.parametrize(
    "entries, rollouts",
    [
        ([], []),
        ([(SCALING, UP), (SCALED, UP)], ["r-1"]),
        ([(SCALED, UP), (SCALING, AGAIN), (SCALED, OTHER)], ["r-1", "r-2"]),
        # The step down of the first one was begun, and not completed.
        ([(SCALED, UP), (SCALING, BACK), (SCALED, OTHER)], ["r-1", "r-2"]),
        ([(SCALED, UP), (SCALED, BACK), (SCALED, OTHER)], ["r-2"]),
        ([(SCALED, UP), (SCALED, BACK)], []),
    ],
)
def test_what_has_scaled_a_workload_up(entries: list[tuple[str, Step]], rollouts: list[str]) -> None:
    """All rollouts since the last step down that was completed: the first of them has the number before."""
    history = ScalingLog.of([entry(event, Scaling.of(step, 0, 3)) for event, step in entries])
    assert [each.rollout for each in history.ups(NEW)] == rollouts


@pytest.mark.parametrize(
    "scaling, now, replicas",
    [
        (Scaling.of(UP, 0, 3), 0, 3),
        (Scaling.of(UP, 0, 3), 3, 3),
        (Scaling.of(UP, 0, 3), 4, 4),
        (Scaling.of(BACK, 3, 0), 3, 0),
        (Scaling.of(BACK, 3, 2), 1, 1),
    ],
)
def test_what_is_still_to_be_set(scaling: Scaling, now: int, replicas: int) -> None:
    """A step that was begun goes to its number, unless somebody went further in the same direction."""
    assert still_to_set(scaling, now) == replicas


@pytest.mark.parametrize(
    "found, use, steps",
    [
        (snapshot(AWAY.demand, UP.demand), NOTHING, (UP, AWAY)),
        (snapshot(AWAY.demand), used("old"), ()),
        (snapshot(UP.demand, active=()), used("new"), ()),
        (snapshot(UP.demand), used("new"), (UP,)),
        # Another rollout has the same new variant.
        (snapshot(UP.demand, active=("r-2",)), ReplicaUse(frozenset({"new"}), frozenset({"new"})), (UP,)),
        (snapshot(AGAIN.demand, active=()), used("old"), (AGAIN,)),
        (snapshot(BACK.demand, active=()), NOTHING, (BACK,)),
        # The workload of another variant that is in use.
        (snapshot(BACK.demand, active=()), used("same"), ()),
        (snapshot(Demand("other", "old", True, "r-1")), NOTHING, ()),
    ],
)
def test_which_demands_are_carried_out(found: RolloutSnapshot, use: ReplicaUse, steps: tuple[Step, ...]) -> None:
    """Those to run while a rollout of the variant is active; those to stop unless the workload is used."""
    assert steps_of(found, {"new": (NEW,), "old": (OLD,), "same": (NEW,)}, use) == steps


@pytest.mark.parametrize(
    "ladder, others, variants",
    [
        (("old", "low"), NOTHING, ("new", "old")),
        (("old", "low"), used("old"), ("new",)),
        (("old", "new"), NOTHING, ("old",)),
        # Adapters: the replicas are those of their bases.
        (("old", "low"), ReplicaUse(bases={"new": "base", "old": "other"}), ("base", "other")),
        (("old", "low"), ReplicaUse(bases={"new": "base", "old": "base"}), ()),
        (("old", "low"), ReplicaUse(bases={"new": "low"}), ("old",)),
        (("old", "low"), ReplicaUse(frozenset({"base"}), bases={"old": "base"}), ("new",)),
    ],
)
def test_whose_replicas_a_rollout_changes(
    ladder: tuple[str, ...], others: ReplicaUse, variants: tuple[str, ...]
) -> None:
    """The new variant's, if it is new to the ladder; the old one's, unless something else uses that."""
    assert changed_variants(plan(ladder), others) == variants


def test_several_workloads_share() -> None:
    """What one workload of the old variant had is shared by those of the new one."""
    assert [shared_evenly(5, count) for count in (1, 2, 3)] == [5, 3, 2]
