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
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import msgspec

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

    def last_down(self, step: Step) -> Scaling | None:
        """The last time that a rollout took replicas from the workload of a step."""
        found = [each for each in self.begun.values() if each.workload == str(step.workload)]
        same = [each for each in found if each.namespace == step.workload.namespace]
        return next((each for each in reversed(same) if each.after < each.before), None)


def steps_of(
    snapshot: RolloutSnapshot, workloads: Mapping[str, Sequence[Workload]], in_use: Container[str]
) -> tuple[Step, ...]:
    """Return what the demands come to, scaling up first.

    A demand to run ends with its rollout. A variant `in_use`, in a ladder in force, is not scaled down: a demand may be
    older than the workload, from the time when a supervisor ran the variant.
    """
    active = {record.id for record in snapshot.active}
    demands = [
        demand
        for demand in snapshot.demands
        if (demand.rollout in active or demand.rollout.startswith(UNDO) if demand.run else demand.variant not in in_use)
    ]
    steps = [Step(demand, workload) for demand in demands for workload in workloads.get(demand.variant, ())]
    return tuple(sorted(steps, key=lambda step: not step.demand.run))


def replicas_after(step: Step, now: int, log: ScalingLog, *, model_replicas: int | None, is_new: bool) -> int:
    """Return how many replicas a workload gets that has `now`.

    Up: as many as the variant that it is started like (`model_replicas`, None if no workload of it is known), else as
    many as a rollout took from it, never fewer than it has. Down: as many as it had before its rollout brought it up
    (`is_new`: it is the rollout's new variant), else none.
    """
    demand = step.demand
    if demand.run:
        taken = log.last_down(step)
        return max(now, 1, model_replicas if model_replicas is not None else taken.before if taken else 1)
    brought_up = log.begun.get(Step(Demand(demand.variant, "", True, demand.rollout), step.workload).key)
    if brought_up is not None:
        return min(now, brought_up.before)
    return now if is_new else 0


def still_to_set(scaling: Scaling, now: int) -> int:
    """Return the number to set: what an operator added before a step up, or took before a step down, stays so."""
    return max(scaling.after, now) if scaling.run else min(scaling.after, now)


def shared_evenly(replicas: int, workloads: int) -> int:
    """Return the replicas of each of some workloads that are to have so many together, rounded up."""
    return math.ceil(replicas / workloads)
