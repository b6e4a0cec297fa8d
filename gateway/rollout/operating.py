"""What operators do to rollouts: start, steer, retry, undo. Each is one change of the state database."""

import asyncio
import getpass
import json
import logging
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from config.errors import ConfigError
from config.schema import AliasSettings
from config.variant import Variant
from gateway.deployment import Deployment, read_deployment
from gateway.rollout.controller import BY_OPERATOR
from gateway.rollout.machine import ANY, Event, Phase, Preconditions, Readiness, Refused, RolloutState, holds
from gateway.rollout.plan import PlanSettings, RolloutPlan, compared, replacement
from gateway.rollout.preflight import compare_quality, fingerprint, plan_problems
from gateway.rollout.record import Happening, change_of, new_rollout, read_plan, read_state, revision_of_split
from gateway.rollout.revision import in_force, read_revision, use_of
from gateway.rollout.scaling import UNDO
from serving.errors import KubernetesError, RolloutChanged
from serving.kubernetes.readiness import has_ready_pod
from serving.replica import State
from serving.state.database import StateDatabase
from serving.state.rollout_records import Demand, LogEntry, RevisionRecord, RolloutRecord
from serving.state.rollouts import RolloutDatabase

log = logging.getLogger(__name__)

HEALTH_SECONDS = 2.0
# A supervisor beats each second; one that has not for so long does not vouch for its replicas.
SILENT_SECONDS = 15.0
# An operator's change is repeated if a driver was faster.
ATTEMPTS = 5


class GateRefused(Exception):
    """A gate, or preflight, said no; the message lists the reasons (exit code 3)."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """What a rollout changes: a new variant that replaces one of the ladder, or another ladder."""

    alias: str
    new: str | None = None
    replaces: str | None = None
    ladder: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator's view of a configuration and its state database; `by` names the operator in the log."""

    deployment: Deployment
    database: RolloutDatabase
    by: str
    wall_clock: Callable[[], float] = time.time

    @classmethod
    def of(cls, path: Path, *, create: bool = False) -> "Operator":
        """Read a configuration; ConfigError if it is invalid, or has no state database."""
        deployment = read_deployment(path)
        if deployment.state is None:
            raise ConfigError(f"{path}: gateway.state is not set; rollouts are recorded there")
        database = RolloutDatabase(StateDatabase.at(deployment.state, create=create))
        return cls(deployment, database, f"{getpass.getuser()}@{socket.gethostname()}")

    def close(self) -> None:
        """Close the database."""
        self.database.database.close()

    # Plans

    def plan(self, target: Replacement, settings: PlanSettings) -> RolloutPlan:
        """Return the plan of a rollout; ConfigError if the names don't fit the configuration."""
        variants = self.deployment.variants
        current = self.ladder(target.alias)
        for name in filter(None, (target.new, target.replaces, *target.ladder)):
            if name not in variants:
                raise ConfigError(f"there is no variant {name!r} in the configuration; known: {', '.join(variants)}")
        new, old, canary, final = _ladders(target, current, variants)
        return RolloutPlan(
            alias=target.alias,
            new=new,
            old=old,
            fingerprint=fingerprint(variants[new]),
            old_fingerprint=fingerprint(variants[old]),
            stable=current,
            canary=canary,
            final=final,
            settings=settings,
        )

    def problems(self, plan: RolloutPlan) -> tuple[str, ...]:
        """Return what preflight would say, without reading the files of the variant."""
        return plan_problems(plan, self.deployment.variants, self.deployment.settings.aliases, compare_quality)

    def ladder(self, alias: str) -> tuple[str, ...]:
        """The ladder of an alias that is in force now."""
        self._alias(alias)
        return in_force(self.deployment, self.database.snapshot()).settings.aliases[alias].ladder

    # Changes

    def start(self, plan: RolloutPlan, why: str) -> RolloutRecord:
        """Start a rollout. GateRefused: preflight says no, or the variant has failed before.

        RolloutExists: another one of the alias is active.
        """
        if failure := self._failed_before(plan):
            raise GateRefused(failure)
        return self._start(plan, why or "started")

    def retry(self, alias: str, why: str) -> RolloutRecord:
        """Start the last rollout of an alias again, with the variants as they are now."""
        record = self.latest(alias)
        plan, variants, current = read_plan(record), self.deployment.variants, self.ladder(alias)
        if record.active:
            raise Refused(f"rollout {record.id} is active (phase {record.phase}); `resume` or `promote` goes on")
        if Phase(record.phase) is Phase.DONE and current == plan.final:
            raise Refused(f"rollout {record.id} was completed: {plan.new} is in the ladder")
        if current != plan.stable or plan.new not in variants or plan.old not in variants:
            raise Refused(f"the ladder of {alias} is {', '.join(current)} now; start a new rollout")
        marks = {"fingerprint": fingerprint(variants[plan.new]), "old_fingerprint": fingerprint(variants[plan.old])}
        return self._start(plan.model_copy(update=marks), why or f"retry of {record.id}")

    def steer(self, alias: str, event: Event, why: str, preconditions: Preconditions = ANY) -> RolloutState:
        """Pause, resume, promote, abort or undo the active rollout; Refused if that is not possible now.

        RolloutChanged: the preconditions do not hold, or others change the rollout all the time. No evidence is read,
        so that an abort takes effect at once however long the rollout is.
        """
        for attempt in range(ATTEMPTS):
            record = self.latest(alias)
            plan = read_plan(record)
            if not record.active:
                raise Refused(f"rollout {record.id} of {alias} has ended (phase {record.phase})")
            _check(preconditions, record)
            now = self.wall_clock()
            what = Happening(event, why or f"by {self.by}", self.by, now)
            snapshot = self.database.snapshot()
            others = use_of(self.deployment, snapshot, without=alias)
            configured = self._alias(alias).ladder
            state, change = change_of(record, what, self.readiness(plan), configured, others)
            try:
                self.database.change(record.id, record.version, change, self.by, now, None, snapshot.revision)
            except RolloutChanged:
                if attempt + 1 == ATTEMPTS:
                    raise
                continue
            return state
        raise AssertionError

    def undo(self, alias: str, number: int | None, why: str) -> str:
        """Go back to a revision of an alias at once, without gates; returns what was done.

        During a rollout that has been promoted it ends that rollout; before, `abort` does.
        """
        record = self.database.latest(alias)
        if record is not None and record.active:
            state = self.steer(alias, Event.UNDO, why)
            return f"rollout {record.id}: {state.phase.value}"
        ladder, found = self._earlier(alias, number)
        if not any(self.is_ready(variant) for variant in ladder):
            raise Refused(
                f"no variant of revision {found} ({', '.join(ladder)}) has a ready replica: nothing would answer; "
                "`quantgate rollout start` brings it back"
            )
        now, configured = self.wall_clock(), self._alias(alias).ladder
        cause = why or f"undo to revision {found}"
        entry = LogEntry(alias, now, self.by, "undo", "undone", cause, json.dumps({"ladder": ladder}))
        document = revision_of_split(ladder, configured)
        undo = f"{UNDO}{secrets.token_hex(4)}"
        served_by = use_of(self.deployment, self.database.snapshot()).bases_of(ladder)
        demands = tuple(Demand(variant, variant, True, undo) for variant in sorted(served_by))
        revision = RevisionRecord(alias, 0, document, cause, self.by, now)
        made = self.database.revise(revision, entry, demands)
        return f"revision {made}: {', '.join(ladder)} (as revision {found})"

    def latest(self, alias: str) -> RolloutRecord:
        """The active rollout of an alias, else the last one; Refused if there was none."""
        self._alias(alias)
        record = self.database.latest(alias)
        if record is None:
            raise Refused(f"there is no rollout of {alias}; `quantgate rollout start` begins one")
        return record

    def _start(self, plan: RolloutPlan, why: str) -> RolloutRecord:
        if problems := self.problems(plan):
            raise GateRefused("\n".join(problems))
        configured = self._alias(plan.alias).ladder
        new = new_rollout(plan, configured, self.by, why, self.wall_clock())
        self.database.start(new.record, new.entry, new.revision)
        return new.record

    def _failed_before(self, plan: RolloutPlan) -> str:
        """Why the last rollout of the alias sent this very variant back; empty if it did not, or an operator did."""
        record = self.database.latest(plan.alias)
        if record is None or Phase(record.phase) not in (Phase.ROLLED_BACK, Phase.FAILED):
            return ""
        failure = read_state(record).failure
        if read_plan(record).fingerprint != plan.fingerprint or failure.startswith(BY_OPERATOR):
            return ""
        return f"{plan.new} failed in rollout {record.id}: {failure}; `quantgate rollout retry` tries it again"

    # Replicas, as they are seen from outside a gateway

    def readiness(self, plan: RolloutPlan) -> Readiness:
        """Whether the variants of a plan are ready."""
        return Readiness(
            self._stands_for(plan.old, plan.old_fingerprint) and self.is_ready(plan.old),
            self._stands_for(plan.new, plan.fingerprint) and self.is_ready(plan.new),
        )

    def is_ready(self, variant: str) -> bool:
        """Whether a supervisor has a ready replica of a variant, one with a `url` is healthy, or a pod is ready."""
        snapshot, now = self.database.database.snapshot(), self.wall_clock()
        living = {owner.id for owner in snapshot.heartbeat.owners if now - owner.beat_at < SILENT_SECONDS}
        if any(
            record.replica.variant == variant and record.state is State.READY and owner in living
            for owner, record in snapshot.records
        ):
            return True
        urls = [each.url for each in self.deployment.settings.replicas if each.variant == variant and each.url]
        return any(_healthy(url) for url in urls if url) or self._has_ready_pod(variant)

    def _has_ready_pod(self, variant: str) -> bool:
        """Ask the API server of Kubernetes; a command that gives a rollout up must not fail because that is away."""
        wanted = self.deployment.wanted
        sources = [source for source in wanted.pods if source.pod.variant == variant]
        try:
            return bool(sources) and asyncio.run(has_ready_pod(wanted.cluster_access(), sources))
        except (KubernetesError, ConfigError) as error:
            log.warning("whether %s has a ready pod is not known: %s", variant, error)
            return False

    def _stands_for(self, name: str, expected: str) -> bool:
        variant = self.deployment.variants.get(name)
        return variant is not None and fingerprint(variant) == expected

    def _alias(self, name: str) -> AliasSettings:
        alias = self.deployment.settings.aliases.get(name)
        if alias is None:
            known = ", ".join(self.deployment.settings.aliases) or "none"
            raise ConfigError(f"there is no alias {name!r} in the configuration; known: {known}")
        return alias

    def _earlier(self, alias: str, number: int | None) -> tuple[tuple[str, ...], int]:
        """The ladder of a revision; without a number, the latest one that differs from what is in force."""
        current = self.ladder(alias)
        records = self.database.revisions(alias, limit=1000)
        whole = [(record.number, read_revision(record)) for record in records]
        if number is not None:
            found = next((revision for each, revision in whole if each == number), None)
            if found is None:
                raise Refused(f"{alias} has no revision {number}; `quantgate rollout history {alias}` lists them")
            return found.stable, number
        for each, revision in whole:
            # The ladder of a promotion is a passing one: both variants, until the old one is drained.
            if revision.stable != current and not (revision.canary and revision.weight == 1):
                return revision.stable, each
        raise Refused(f"{alias} has no earlier revision with another ladder than {', '.join(current)}")


def _ladders(
    target: Replacement, current: tuple[str, ...], variants: Mapping[str, Variant]
) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
    """Return the new variant, the old one, the canary's ladder and the final one."""
    if target.ladder:
        if len(set(target.ladder)) != len(target.ladder):
            raise ConfigError("a ladder has each variant once")
        if target.ladder == current:
            raise ConfigError(f"the ladder of {target.alias} is {', '.join(current)} already")
        old, new = compared(current, target.ladder)
        return new, old, target.ladder, target.ladder
    assert target.new is not None
    old = target.replaces or _replaced(target.new, current, variants)
    if old not in current:
        raise ConfigError(f"{old!r} is not in the ladder of {target.alias}: {', '.join(current)}")
    if target.new in current:
        raise ConfigError(f"{target.new!r} is in the ladder of {target.alias} already; --ladder changes the order")
    canary, final = replacement(current, target.new, old)
    return target.new, old, canary, final


def _replaced(new: str, current: Sequence[str], variants: Mapping[str, Variant]) -> str:
    """The variant that a new one replaces: the only one, or the only one of the same precision."""
    if len(current) == 1:
        return current[0]
    precision = variants[new].precision if new in variants else None
    same = [name for name in current if name in variants and variants[name].precision == precision]
    if len(same) != 1:
        raise ConfigError(f"name the variant that {new} replaces with --replaces; the ladder is {', '.join(current)}")
    return same[0]


def _check(preconditions: Preconditions, record: RolloutRecord) -> None:
    """RolloutChanged if the preconditions of a command do not hold."""
    state = read_state(record)
    if not holds(preconditions, record.id, state):
        where = f"rollout {record.id} of {record.alias}, in phase {state.phase.value}, step {state.step + 1}"
        raise RolloutChanged(f"the command was for an earlier state; it is {where} now: look again")


def _healthy(url: str) -> bool:
    """Whether an address answers; nothing secret is sent, and nothing but the status is believed."""
    if url.startswith("unix:"):
        return Path(url.removeprefix("unix://")).exists()
    try:
        reply = httpx.get(f"{url}/health", timeout=HEALTH_SECONDS, trust_env=False, verify=False)  # noqa: S501
    except httpx.HTTPError:
        return False
    return reply.is_success
