"""Scales the workloads of a Kubernetes cluster as rollouts demand it, as a supervisor does with processes.

Every gateway process with workloads in its configuration has a scaler; a lease of the state database lets one of them
work at a time. It holds nothing that another one could not read again: see `gateway.rollout.scaling`. A step that was
begun under a lost lease is harmless: the workload's version has changed, or the number is the recorded one.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import msgspec

from config.schema import ReplicaSettings
from gateway.rollout.machine import Phase, Refused
from gateway.rollout.record import read_plan
from gateway.rollout.replica_use import ReplicaUse
from gateway.rollout.revision import read_revision
from gateway.rollout.scaling import (
    SCALE_FAILED,
    SCALED,
    SCALING,
    Scaling,
    ScalingLog,
    Step,
    StepKey,
    replicas_after,
    shared_evenly,
    steps_of,
    still_to_set,
)
from serving.defects import logged_defects
from serving.errors import (
    ApiConflict,
    ApiServerAway,
    ApiServerFailed,
    ApiThrottled,
    KubernetesError,
    StateAway,
)
from serving.kubernetes.access import ClusterAccess
from serving.kubernetes.api import KubernetesApi
from serving.kubernetes.scale import WorkloadScale
from serving.kubernetes.workloads import Workload, Workloads, workloads_of
from serving.state.link import Link
from serving.state.rollout_records import LogEntry, RolloutSnapshot
from serving.state.rollouts import RolloutDatabase

log = logging.getLogger(__name__)

FOLLOW_SECONDS = 1.0
# After an error of the API server, unless that says when to ask again.
RETRY_SECONDS = 5.0
# Longer than a request to the API server may take. No alias has such a name.
LEASE_SECONDS, LEASE = 15.0, "@workloads"
# A step ends before the lease does, so that no two processes work at a time.
STEP_SECONDS = 12.0
# Other writers of a workload, such as its controller, may be faster so often.
ATTEMPTS = 5


@dataclass(slots=True)
class Scaler:
    """Scales the workloads of configured replicas while the `async with` block runs.

    `access` is called when there is a first workload; OptionError if there is no access to a cluster.
    """

    link: Link
    access: Callable[[], ClusterAccess]
    replicas: Callable[[], Iterable[ReplicaSettings]]
    snapshot: Callable[[], RolloutSnapshot]
    use: Callable[[RolloutSnapshot], ReplicaUse]
    holder: str
    wall_clock: Callable[[], float] = time.time
    _done: set[StepKey] = field(default_factory=set)
    _failed: dict[StepKey, type[Exception]] = field(default_factory=dict)
    _retry_at: dict[StepKey, float] = field(default_factory=dict)
    _pause_until: float = 0.0
    _is_holder: bool = False
    _scale: WorkloadScale | None = None
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    _task: asyncio.Task[None] | None = None

    @property
    def _database(self) -> RolloutDatabase:
        return RolloutDatabase(self.link.database)

    async def __aenter__(self) -> Self:
        """Begin to follow what rollouts demand."""
        self._task = asyncio.create_task(self._follow_regularly(), name="scale workloads")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and give the lease back."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._is_holder:
            with suppress(StateAway):
                await self.link.call(self._database.release, LEASE, self.holder)
        self.link.close()
        await self._stack.aclose()

    async def follow(self) -> None:
        """Carry out the demands that are not, unless another process does."""
        workloads = await self._workloads()
        if not workloads or self.wall_clock() < self._pause_until:
            return
        steps = self._due(workloads)
        if not steps:
            return
        with suppress(StateAway):  # the follower of rollouts says so
            self._done |= (await self._read_log()).done
            for step in steps:
                if step.key not in self._done and not await self._carry_out(step):
                    return

    async def problems(self, variants: Iterable[str]) -> tuple[str, ...]:
        """Return why the workloads of variants cannot be scaled; waits while the API server is away."""
        by_variant = await self._workloads()
        workloads = [workload for variant in variants for workload in by_variant.get(variant, ())]
        return tuple([problem for workload in workloads if (problem := await self._problem(workload))])

    def _due(self, workloads: Workloads) -> list[Step]:
        """The steps to carry out now; one that failed comes last, so that it does not keep others waiting."""
        snapshot, now = self.snapshot(), self.wall_clock()
        steps = [step for step in steps_of(snapshot, workloads, self.use(snapshot)) if step.key not in self._done]
        due = [step for step in steps if self._retry_at.get(step.key, 0.0) <= now]
        return sorted(due, key=lambda step: self._retry_at.get(step.key, 0.0))

    async def _follow_regularly(self) -> None:
        while True:
            with logged_defects("scaling workloads"):
                await self.follow()
            await asyncio.sleep(FOLLOW_SECONDS)

    async def _workloads(self) -> Workloads:
        """The workloads of the configuration, by variant."""
        replicas = [each for each in self.replicas() if each.kubernetes is not None and each.kubernetes.workload]
        if replicas and self._scale is None:
            self._scale = WorkloadScale(await self._stack.enter_async_context(KubernetesApi(self.access())))
        return workloads_of(replicas, self._cluster.api.access.namespace) if replicas else {}

    @property
    def _cluster(self) -> WorkloadScale:
        assert self._scale is not None
        return self._scale

    async def _carry_out(self, step: Step) -> bool:
        """Scale a workload, or say why not; False if nothing can be done now: another process works, or no server."""
        try:
            for _ in range(ATTEMPTS):
                if not await self._leased():
                    return False
                with suppress(ApiConflict):
                    async with asyncio.timeout(STEP_SECONDS):
                        await self._scale_step(step)
                    return True
        except (KubernetesError, Refused, TimeoutError) as error:
            await self._fail(step, error)
            return not _is_away(error)
        return True

    async def _scale_step(self, step: Step) -> None:
        snapshot, history = await self.link.call(self._database.snapshot), await self._read_log()
        if step.key in history.done or step not in steps_of(snapshot, await self._workloads(), self.use(snapshot)):
            return  # meanwhile another process has done it, or the rollout wants something else
        await self._cluster.check_manual(step.workload)
        seen = await self._cluster.read(step.workload)
        scaling = history.begun.get(step.key)
        if scaling is None:
            after = await self._replicas_after(step, seen.spec.replicas, history)
            scaling = Scaling.of(step, seen.spec.replicas, after)
            if scaling.after != scaling.before:
                await self._write(step, SCALING, _described(scaling), scaling)
        replicas = still_to_set(scaling, seen.spec.replicas)
        if replicas != seen.spec.replicas:
            await self._cluster.write(step.workload, seen, replicas)
        await self._write(step, SCALED, f"{step.workload} has {replicas} replicas", scaling)
        log.info("%s in the namespace %s has %d replicas now", step.workload, step.workload.namespace, replicas)
        self._done.add(step.key)
        self._failed.pop(step.key, None)

    async def _replicas_after(self, step: Step, now: int, history: ScalingLog) -> int:
        demand, workloads = step.demand, await self._workloads()
        models = () if demand.modeled_on == demand.variant else workloads.get(demand.modeled_on, ())
        together = sum([(await self._cluster.read(model)).spec.replicas for model in models] if demand.run else [])
        model_replicas = shared_evenly(together, len(workloads[demand.variant])) if models else None
        before = 0 if demand.run else await self._before(step, now, history)
        return replicas_after(step, now, history, model_replicas=model_replicas, before=before)

    async def _before(self, step: Step, now: int, history: ScalingLog) -> int:
        """The fewest replicas before rollouts scaled a workload up and went back; 0 if its variant was replaced."""
        record = await self.link.call(self._database.get, step.demand.rollout)
        if record is None or self.use(self.snapshot()).base(read_plan(record).new) != step.demand.variant:
            return 0
        before = now
        for up in reversed(history.ups(step.workload)):
            record = await self.link.call(self._database.get, up.rollout)
            if record is None or record.phase == Phase.DONE:
                break  # what an undo or a promotion brought up stays
            before = min(before, up.before)
        return before

    async def _problem(self, workload: Workload) -> str:
        while True:
            try:
                await self._cluster.check_manual(workload)
                await self._cluster.read(workload)
            except (ApiServerAway, ApiThrottled) as error:
                # The phase of the rollout has a deadline.
                log.warning("%s cannot be checked, trying again: %s", workload, error)
                await asyncio.sleep(RETRY_SECONDS)
            except KubernetesError as error:
                return str(error)
            else:
                return ""

    async def _fail(self, step: Step, error: Exception) -> None:
        """Wait before the next attempt, and say why, once for each kind of error."""
        retry_after = error.retry_after_seconds if isinstance(error, ApiThrottled) else None
        self._retry_at[step.key] = self.wall_clock() + (RETRY_SECONDS if retry_after is None else retry_after)
        if _is_away(error):
            self._pause_until = self._retry_at[step.key]
        if self._failed.get(step.key) is type(error):
            return
        self._failed[step.key] = type(error)
        why = str(error) or f"{step.workload} could not be scaled within {STEP_SECONDS:g} s"
        log.warning("%s is not scaled for %s: %s", step.workload, step.demand.rollout, why)
        await self._write(step, SCALE_FAILED, why, None)

    async def _leased(self) -> bool:
        now = self.wall_clock()
        fence = await self.link.call(self._database.lease, LEASE, self.holder, now, LEASE_SECONDS)
        self._is_holder = fence is not None
        return self._is_holder

    async def _read_log(self) -> ScalingLog:
        return ScalingLog.of(await self.link.call(self._database.events, (SCALING, SCALED)))

    async def _write(self, step: Step, event: str, why: str, scaling: Scaling | None) -> None:
        """Add an entry to the log of the rollout's alias; it has no hooks."""
        demand = step.demand
        record = await self.link.call(self._database.get, demand.rollout)
        alias, phase = (record.alias, record.phase) if record else (self._alias(demand.variant), "undone")
        figures = "{}" if scaling is None else msgspec.json.encode(scaling).decode()
        entry = LogEntry(alias, self.wall_clock(), self.holder, event, phase, why, figures)
        await self.link.call(self._database.log, entry)

    def _alias(self, variant: str) -> str:
        """The first alias whose recorded ladder is served by a variant; empty if none is."""
        snapshot = self.snapshot()
        ladders = {each.alias: read_revision(each).stable for each in snapshot.aliases}
        use = self.use(snapshot)
        return next((alias for alias, ladder in ladders.items() if variant in use.bases_of(ladder)), "")


def _described(scaling: Scaling) -> str:
    return f"{scaling.workload} from {scaling.before} to {scaling.after} replicas, for {scaling.rollout}"


def _is_away(error: Exception) -> bool:
    """Whether the API server answers nothing: other workloads could not be scaled, either."""
    return isinstance(error, ApiServerAway | TimeoutError) and not isinstance(error, ApiServerFailed)
