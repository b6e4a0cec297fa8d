"""How many replicas a rollout wants of a workload, and which demands it carries out at all."""

import msgspec
import pytest

from gateway.rollout.record import changed_variants
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


def entry(event: str, scaling: Scaling) -> LogEntry:
    return LogEntry("smol", 0.0, "gateway", event, "starting", "", msgspec.json.encode(scaling).decode())


def log_of(*scalings: Scaling) -> ScalingLog:
    return ScalingLog.of([entry(SCALING, scaling) for scaling in scalings])


def snapshot(*demands: Demand, active: tuple[str, ...] = ("r-1",)) -> RolloutSnapshot:
    records = [RolloutRecord(name, "smol", "", "", "starting", True, 0, "anna", 0.0) for name in active]
    return RolloutSnapshot("e", 1, tuple(records), EMPTY.aliases, demands)


@pytest.mark.parametrize(
    "step, now, history, model, is_new, after",
    [
        # Up: as many as the variant that is replaced, never fewer than there are, at least one.
        (UP, 0, log_of(), 3, True, 3),
        (UP, 5, log_of(), 3, True, 5),
        (UP, 0, log_of(), 0, True, 1),
        (UP, 0, log_of(), None, True, 1),
        # Down after promotion: none.
        (AWAY, 3, log_of(), None, False, 0),
        # Down after a rollback: as before the rollout, also if that had begun nothing yet.
        (BACK, 3, log_of(Scaling.of(UP, 0, 3)), None, True, 0),
        (BACK, 3, log_of(Scaling.of(UP, 2, 3)), None, True, 2),
        (BACK, 1, log_of(Scaling.of(UP, 2, 3)), None, True, 1),
        (BACK, 2, log_of(), None, True, 2),
        # Up for an undo: as many as were taken last.
        (AGAIN, 0, log_of(Scaling.of(AWAY, 3, 0)), None, False, 3),
        (AGAIN, 4, log_of(Scaling.of(AWAY, 3, 0)), None, False, 4),
        (AGAIN, 0, log_of(Scaling.of(UP, 0, 3)), None, False, 1),
    ],
)
def test_the_number_of_replicas(
    step: Step, now: int, history: ScalingLog, model: int | None, is_new: bool, after: int
) -> None:
    """See the comments."""
    assert replicas_after(step, now, history, model_replicas=model, is_new=is_new) == after


def test_the_first_entry_of_a_step_has_the_number_before() -> None:
    """A process that goes on after a crash must not take the changed number for the one before the rollout."""
    history = ScalingLog.of([entry(SCALING, Scaling.of(UP, 0, 3)), entry(SCALED, Scaling.of(UP, 3, 3))])
    assert history.begun[UP.key].before == 0
    assert history.done == {UP.key}
    assert ScalingLog.of([entry(SCALING, Scaling.of(UP, 0, 3))]).done == frozenset()


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
    "found, in_use, steps",
    [
        (snapshot(AWAY.demand, UP.demand), frozenset(), (UP, AWAY)),
        (snapshot(AWAY.demand), frozenset({"old"}), ()),
        (snapshot(UP.demand, active=()), frozenset({"new"}), ()),
        (snapshot(UP.demand), frozenset({"new"}), (UP,)),
        (snapshot(AGAIN.demand, active=()), frozenset({"old"}), (AGAIN,)),
        (snapshot(BACK.demand, active=()), frozenset(), (BACK,)),
        (snapshot(Demand("other", "old", True, "r-1")), frozenset(), ()),
    ],
)
def test_which_demands_are_carried_out(found: RolloutSnapshot, in_use: frozenset[str], steps: tuple[Step, ...]) -> None:
    """Those to run while their rollout is active; those to stop unless an alias uses the variant."""
    assert steps_of(found, {"new": (NEW,), "old": (OLD,)}, in_use) == steps


@pytest.mark.parametrize(
    "ladder, in_use, variants",
    [
        (("old", "low"), frozenset(), ("new", "old")),
        (("old", "low"), frozenset({"old"}), ("new",)),
        (("old", "new"), frozenset(), ("old",)),
    ],
)
def test_whose_replicas_a_rollout_changes(
    ladder: tuple[str, ...], in_use: frozenset[str], variants: tuple[str, ...]
) -> None:
    """The new variant's, if it is new to the ladder; the old one's, unless another alias uses that."""
    assert changed_variants(plan(ladder), in_use) == variants


def test_several_workloads_share() -> None:
    """What one workload of the old variant had is shared by those of the new one."""
    assert [shared_evenly(5, count) for count in (1, 2, 3)] == [5, 3, 2]
