"""Which workloads of a cluster rollouts want scaled, and to how many replicas. Pure.

A demand of a rollout is carried out once for each workload of its variant, and the audit log says so:

============  ===========================================================================================
event         meaning
============  ===========================================================================================
scaling       written before the first change: the numbers of replicas before and after it
scaled        the workload has been given that number; it is never touched again for this demand
scale_failed  why it cannot be scaled now; it is tried again
============  ===========================================================================================

So a process that goes on after another one was killed changes to the recorded number, whatever the other one had done,
and what an operator scales afterwards stays.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import msgspec

from gateway.rollout.replica_use import ReplicaUse
from serving.kubernetes.workloads import Workload
from serving.state.rollout_records import Demand, LogEntry, RolloutSnapshot

# Rollout, variant, whether it is to run, namespace and workload.
StepKey = tuple[str, str, bool, str, str]
# How demands of an undo are named, which belong to no rollout.
UNDO = "undo-"
SCALING, SCALED, SCALE_FAILED = "scaling", "scaled", "scale_failed"


@dataclass(frozen=True, slots=True)
class Step:
    """One workload to scale for a demand: up if it is to run."""

    demand: Demand
    workload: Workload

    @property
    def key(self) -> StepKey:
        """What the log knows it by."""
        demand, workload = self.demand, self.workload
        return demand.rollout, demand.variant, demand.run, workload.namespace, str(workload)


class Scaling(msgspec.Struct, frozen=True):
    """The figures of a log entry: a step, and the numbers of replicas before and after it."""

    rollout: str
    variant: str
    run: bool
    namespace: str
    workload: str
    before: int
    after: int

    @classmethod
    def of(cls, step: Step, before: int, after: int) -> Self:
        """Return the figures of a step."""
        return cls(*step.key, before, after)

    @property
    def key(self) -> StepKey:
        """The step that this is about."""
        return self.rollout, self.variant, self.run, self.namespace, self.workload


@dataclass(frozen=True, slots=True)
class ScalingLog:
    """What the audit log says about workloads: the first `scaling` of each step in order, and the steps done."""

    begun: Mapping[StepKey, Scaling] = field(default_factory=dict)
    done: frozenset[StepKey] = frozenset()

    @classmethod
    def of(cls, entries: Iterable[LogEntry]) -> Self:
        """Read the entries, oldest first."""
        begun: dict[StepKey, Scaling] = {}
        done = set()
        for entry in entries:
            if entry.event in (SCALING, SCALED):
                scaling = msgspec.json.decode(entry.figures, type=Scaling)
                begun.setdefault(scaling.key, scaling)
                if entry.event == SCALED:
                    done.add(scaling.key)
        return cls(begun, frozenset(done))

    def last_down(self, workload: Workload) -> Scaling | None:
        """The last time that a rollout took replicas from a workload."""
        return next((each for each in reversed(self._of(workload)) if each.after < each.before), None)

    def ups(self, workload: Workload) -> tuple[Scaling, ...]:
        """The steps up of a workload since its last step down that was completed, in order."""
        steps = self._of(workload)
        downs = [index for index, each in enumerate(steps) if not each.run and each.key in self.done]
        return tuple(each for each in steps[downs[-1] + 1 if downs else 0 :] if each.run)

    def _of(self, workload: Workload) -> list[Scaling]:
        where = (workload.namespace, str(workload))
        return [each for each in self.begun.values() if (each.namespace, each.workload) == where]


def steps_of(
    snapshot: RolloutSnapshot, workloads: Mapping[str, Sequence[Workload]], use: ReplicaUse
) -> tuple[Step, ...]:
    """Return what the demands come to, scaling up first.

    A demand to run ends with the last rollout of the new variant: it may be an earlier one's. The workload of a variant
    in use is not scaled down: a demand may be older than the workload, from the time when a supervisor ran the variant.
    """
    active = {record.id for record in snapshot.active}
    used = {workload for variant in use.in_use for workload in workloads.get(variant, ())}
    steps = [Step(demand, workload) for demand in snapshot.demands for workload in workloads.get(demand.variant, ())]
    up = [
        step
        for step in steps
        if step.demand.run
        and (step.demand.rollout in active or step.demand.rollout.startswith(UNDO) or step.demand.variant in use.new)
    ]
    return (*up, *(step for step in steps if not step.demand.run and step.workload not in used))


def replicas_after(step: Step, now: int, log: ScalingLog, *, model_replicas: int | None, before: int) -> int:
    """Return how many replicas a workload gets that has `now`.

    Up: as many as the variant that it is started like (`model_replicas`, None if no workload of it is known), else as
    many as a rollout took from it, never fewer than it has. Down: as many as it had `before`, and no more than now.
    """
    if not step.demand.run:
        return min(now, before)
    taken = log.last_down(step.workload)
    return max(now, 1, model_replicas if model_replicas is not None else taken.before if taken else 1)


def still_to_set(scaling: Scaling, now: int) -> int:
    """Return the number to set: what an operator added before a step up, or took before a step down, stays so."""
    return max(scaling.after, now) if scaling.run else min(scaling.after, now)


def shared_evenly(replicas: int, workloads: int) -> int:
    """Return the replicas of each of some workloads that are to have so many together, rounded up."""
    return math.ceil(replicas / workloads)
