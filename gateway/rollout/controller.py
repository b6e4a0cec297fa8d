"""Drives the rollouts of the state database: finds what happens, writes it, then acts on it.

Every gateway process has a driver; a lease with a fencing number lets one of them drive each alias. A driver keeps
nothing that the next one could not read again: state and plan come from the record, evidence from the blocks, and what
must be done in a phase (checks, hooks) is repeated by the next driver if it is not recorded as done.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import msgspec

from gateway.deployment import Deployment
from gateway.rollout.hooks import run_hooks
from gateway.rollout.machine import FINAL, PROMOTED, Event, Phase, Readiness, Refused, RolloutState
from gateway.rollout.plan import RolloutPlan
from gateway.rollout.preflight import Comparison, Preflight, compare_quality, fingerprint
from gateway.rollout.progress import NO_FAILED_STARTS, Facts, FailedStarts, Progress, next_event
from gateway.rollout.record import Happening, change_of, changed_variants, read_plan, read_state
from gateway.rollout.revision import use_of
from gateway.rollout.smoke import SmokeClient
from serving.defects import logged_defects
from serving.errors import LeaseLost, RolloutChanged, StateAway
from serving.registry import Registry
from serving.replica import Replica
from serving.state.link import Link
from serving.state.rollout_records import LogEntry, RolloutRecord, RolloutSnapshot
from serving.state.rollouts import RolloutDatabase

log = logging.getLogger(__name__)

DRIVE_SECONDS = 1.0
LEASE_SECONDS = 10.0
# Blocks are read again for so long: the clocks of workers differ, and a worker may write late.
REREAD_SECONDS = 300.0
BLOCKS_AT_ONCE = 50  # a few milliseconds
BY_OPERATOR = (f"{Event.ABORT.value}:", f"{Event.UNDO.value}:")

Check = asyncio.Task[tuple[str, ...]]


class SmokeTest(Protocol):
    """Asks a fixed set of prompts of a new variant."""

    async def problems(self, new: Replica, old: Replica | None) -> tuple[str, ...]:
        """Return what is wrong with a replica of the new variant, beside one of the old variant."""

    async def aclose(self) -> None:
        """Close the connections."""


@dataclass(frozen=True, slots=True)
class DriverContext:
    """What a driver reads: the configuration, what gateways follow, and the replicas of this process' registry."""

    link: Link
    registry: Registry
    deployment: Callable[[], Deployment]
    snapshot: Callable[[], RolloutSnapshot]
    requests: Callable[[str], float]  # in flight on the replicas of a variant, from all senders
    holder: str
    rolled_back: Callable[[str, str], None]  # counts an alias' rollback, with its cause
    compare: Comparison = compare_quality
    workload_problems: Callable[[Iterable[str]], Awaitable[tuple[str, ...]]] | None = None
    wall_clock: Callable[[], float] = time.time


@dataclass(slots=True)
class Job:
    """What a driver has of one rollout while it drives it."""

    plan: RolloutPlan
    progress: Progress
    fence: int = 0
    read_until: float = 0.0
    lost_since: float | None = None
    starts: FailedStarts = NO_FAILED_STARTS
    check: Check | None = None
    checked: tuple[Phase, float] | None = None  # the phase that the check belongs to, and when that began
    hooks: asyncio.Task[None] | None = None
    by_operator: bool = False  # an operator sent it back, which has been counted

    def cancel(self) -> None:
        """End what runs for this rollout."""
        for task in (self.check, self.hooks):
            if task is not None:
                task.cancel()


@dataclass(slots=True)
class Driver:
    """Drives rollouts while the `async with` block runs."""

    context: DriverContext
    smoke: SmokeTest = field(default_factory=SmokeClient)
    jobs: dict[str, Job] = field(default_factory=dict)
    _task: asyncio.Task[None] | None = None

    @property
    def _database(self) -> RolloutDatabase:
        return RolloutDatabase(self.context.link.database)

    async def __aenter__(self) -> Self:
        """Begin to drive."""
        self._task = asyncio.create_task(self._drive_regularly(), name="drive rollouts")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and give the leases back, so that another driver goes on at once."""
        tasks = [task for job in self.jobs.values() for task in (job.check, job.hooks) if task is not None]
        tasks += [self._task] if self._task else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for alias in {job.plan.alias for job in self.jobs.values()}:
            with suppress(StateAway):
                await self.context.link.call(self._database.release, alias, self.context.holder)
        await self.smoke.aclose()
        self.context.link.close()

    async def drive(self) -> None:
        """Take one step in every active rollout that nothing else drives."""
        active = self.context.snapshot().active
        for rollout_id in self.jobs.keys() - {record.id for record in active}:
            # The hooks of its last transition may still run.
            self._finish(self.jobs[rollout_id], rollout_id)
        for record in active:
            try:
                await self._drive_one(record)
            except StateAway:
                return  # the follower says so; everything stays as it is
            except (RolloutChanged, Refused) as error:
                log.info("rollout %s: %s", record.id, error)
            except LeaseLost as error:
                log.warning("rollout %s: %s", record.id, error)
                self._drop(record.id)

    async def _drive_regularly(self) -> None:
        while True:
            with logged_defects("driving rollouts"):
                await self.drive()
            await asyncio.sleep(DRIVE_SECONDS)

    async def _drive_one(self, record: RolloutRecord) -> None:
        context, link = self.context, self.context.link
        now = context.wall_clock()
        fence = await link.call(self._database.lease, record.alias, context.holder, now, LEASE_SECONDS)
        if fence is None:
            self._drop(record.id)
            return
        current = await link.call(self._database.get, record.id)
        if current is None or not current.active:
            return
        job = self.jobs.get(record.id)
        if job is None or job.fence != fence:
            self._drop(record.id)
            plan = read_plan(current)
            job = self.jobs[record.id] = Job(plan, Progress(plan), fence)
        await self._read_evidence(job, record.id, now)
        self._run_hooks(job, record.id)
        state = read_state(current)
        if state.phase is Phase.ROLLING_BACK and state.failure.startswith(BY_OPERATOR) and not job.by_operator:
            job.by_operator = True
            context.rolled_back(record.alias, "operator")
        self._check(job, state)
        found = next_event(state, job.plan, job.progress, self._facts(job, state), now)
        if found is not None:
            await self._write(current, job, *found)

    async def _read_evidence(self, job: Job, rollout_id: str, now: float) -> None:
        since = job.read_until - REREAD_SECONDS if job.read_until else 0.0
        blocks = await self.context.link.call(self._database.blocks, rollout_id, since)
        for first in range(0, len(blocks), BLOCKS_AT_ONCE):
            job.progress.add(blocks[first : first + BLOCKS_AT_ONCE])
            await asyncio.sleep(0)  # requests share this event loop, and a rollout of a day has thousands of blocks
        job.read_until = now

    async def _write(self, record: RolloutRecord, job: Job, event: Event, why: str) -> None:
        context, plan = self.context, job.plan
        now, deployment = context.wall_clock(), context.deployment()
        what = Happening(event, why, context.holder, now, figures(job.progress))
        configured = deployment.settings.aliases[plan.alias].ladder if plan.alias in deployment.settings.aliases else ()
        snapshot = await context.link.call(self._database.snapshot)
        others = use_of(deployment, snapshot, without=plan.alias)
        state, change = change_of(record, what, self._ready(plan), configured, others)
        await context.link.call(
            self._database.change, record.id, record.version, change, context.holder, now, job.fence, snapshot.revision
        )
        if state.phase in (Phase.FAILED, Phase.ROLLING_BACK):
            context.rolled_back(plan.alias, cause_of(event, Phase(record.phase)))
        # Draining and keeping end with a deadline in the normal way.
        bad = event in (Event.FAILED, Event.MISMATCH, Event.DEADLINE) and state.phase not in PROMOTED
        level = logging.WARNING if bad else logging.INFO
        log.log(level, "rollout %s of %s: %s -> %s: %s", record.id, plan.alias, event, state.phase.value, why)

    # Facts

    def _facts(self, job: Job, state: RolloutState) -> Facts:
        ready = self._ready(job.plan)
        now = self.context.wall_clock()
        job.lost_since = None if ready.new else job.lost_since or now
        lost_seconds = 0.0 if job.lost_since is None else now - job.lost_since
        problems = None
        if job.check is not None and job.check.done() and not job.check.cancelled():
            problems = _result(job.check)
        new, replicas = job.plan.new, self.context.registry.snapshot()
        starting = state.phase is Phase.STARTING
        own = [each for each in replicas if each.replica.variant == new]
        job.starts = job.starts.after(own) if starting else NO_FAILED_STARTS
        return Facts(ready, problems, lost_seconds, self.context.requests(new) == 0, job.starts)

    def _ready(self, plan: RolloutPlan) -> Readiness:
        return Readiness(
            self._replica(plan.old, plan.old_fingerprint) is not None,
            self._replica(plan.new, plan.fingerprint) is not None,
        )

    def _replica(self, variant: str, expected: str) -> Replica | None:
        """A ready replica of a variant, if the name still stands for the content that the plan names."""
        known = self.context.deployment().variants.get(variant)
        if known is None or fingerprint(known) != expected:
            return None
        replicas = self.context.registry.ready.get(variant, ())
        return replicas[0] if replicas else None

    # Checks and hooks

    def _check(self, job: Job, state: RolloutState) -> None:
        """Start the check of a phase, once; one of an earlier phase ends."""
        phase = (state.phase, state.since)
        if job.checked == phase:
            return
        if job.check is not None:
            job.check.cancel()
        job.check, job.checked = None, phase
        if state.phase is Phase.PREFLIGHT:
            job.check = asyncio.create_task(self._preflight(job.plan), name="preflight of a rollout")
        elif state.phase is Phase.SMOKE:
            job.check = asyncio.create_task(self._smoke(job.plan), name="smoke test of a rollout")

    async def _preflight(self, plan: RolloutPlan) -> tuple[str, ...]:
        context, deployment = self.context, self.context.deployment()
        checks = Preflight(deployment.variants, deployment.settings.aliases, context.compare)
        found = await checks.problems(plan)
        if context.workload_problems is None:
            return found
        others = use_of(deployment, context.snapshot(), without=plan.alias)
        return (*found, *await context.workload_problems(changed_variants(plan, others)))

    async def _smoke(self, plan: RolloutPlan) -> tuple[str, ...]:
        new = self._replica(plan.new, plan.fingerprint)
        if new is None:
            return (f"{plan.new} has no ready replica any more",)
        return await self.smoke.problems(new, self._replica(plan.old, plan.old_fingerprint))

    def _run_hooks(self, job: Job, rollout_id: str) -> None:
        if job.hooks is None or job.hooks.done():
            job.hooks = asyncio.create_task(self._hooks(job.plan, rollout_id), name="hooks of a rollout")

    async def _hooks(self, plan: RolloutPlan, rollout_id: str) -> None:
        """Run the hooks of entries that have none yet, in order; a failed one is logged, and not repeated."""
        link = self.context.link
        with suppress(StateAway):
            for entry in await link.call(self._database.without_hooks, rollout_id):
                for problem in await run_hooks(plan.settings.hooks, entry):
                    log.warning("hook of rollout %s after %s: %s", rollout_id, entry.event, problem)
                    failure = LogEntry(
                        *(entry.alias, self.context.wall_clock(), self.context.holder, "hook_failed", entry.phase),
                        problem,
                        rollout=None,
                    )
                    await link.call(self._database.log, failure)
                await link.call(self._database.hooked, entry.seq)

    def _finish(self, job: Job, rollout_id: str) -> None:
        """Run the hooks of the last transition, then forget a rollout."""
        if job.checked is not None and job.checked[0] in FINAL:
            if job.hooks is None or job.hooks.done():
                self._drop(rollout_id)
            return
        if job.hooks is None or job.hooks.done():
            job.checked = (Phase.DONE, 0.0)
            self._run_hooks(job, rollout_id)

    def _drop(self, rollout_id: str) -> None:
        job = self.jobs.pop(rollout_id, None)
        if job is not None:
            job.cancel()


def cause_of(event: Event, before: Phase) -> str:
    """Why a rollout went back, in a word, for the metric."""
    if event is Event.DEADLINE:
        return "deadline"
    early = (Phase.PREFLIGHT, Phase.STARTING, Phase.SMOKE, Phase.SHADOW)
    return before.value if before in early else "gate"


def figures(progress: Progress) -> str:
    """The figures of an entry of the log, as JSON."""
    gates = {
        gate.settings.name: {"verdict": gate.verdict, "log_evidence": round(gate.log_e, 4)} for gate in progress.gates
    }
    return msgspec.json.encode({"canary": progress.canary, "stable": progress.stable, "gates": gates}).decode()


def _result(check: Check) -> tuple[str, ...]:
    error = check.exception()
    return (f"the check failed: {error!r}",) if error is not None else check.result()
