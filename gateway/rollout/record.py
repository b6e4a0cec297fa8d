"""Writes the transitions of a rollout: its state, the alias' revision, wanted replicas and the log entry, in one step.

Drivers and operators write through the same function; the later one reads the rollout again.
"""

import secrets
from dataclasses import dataclass

import msgspec
from pydantic import ValidationError

from gateway.rollout.machine import (
    FINAL,
    START,
    Event,
    Phase,
    Readiness,
    Refused,
    RolloutState,
    Split,
    advance,
    split,
)
from gateway.rollout.plan import RolloutPlan
from gateway.rollout.replica_use import ReplicaUse
from gateway.rollout.revision import AliasRevision, Ladder
from serving.state.rollout_records import Change, Demand, LogEntry, RolloutRecord

_STATES = msgspec.json.Decoder(RolloutState)


class UnreadableRecord(Refused):
    """A record of a rollout, or its evidence, that another version has written; the message says what is wrong."""


def read_state(record: RolloutRecord) -> RolloutState:
    """Decode the state of a rollout; UnreadableRecord if another version wrote it."""
    try:
        return _STATES.decode(record.state)
    except msgspec.DecodeError as error:
        raise unreadable(f"the state of rollout {record.id}", str(error)) from error


def read_plan(record: RolloutRecord) -> RolloutPlan:
    """Decode the plan of a rollout; UnreadableRecord if another version wrote it."""
    try:
        return RolloutPlan.model_validate_json(record.plan)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise unreadable(f"the plan of rollout {record.id}", f"{place}: {first['msg']}") from error


def unreadable(what: str, why: str) -> UnreadableRecord:
    """The error for something recorded that this version cannot read."""
    return UnreadableRecord(f"{what} was recorded by another version of quantgate ({why}); use that version for it")


@dataclass(frozen=True, slots=True)
class NewRollout:
    """What `start` writes."""

    record: RolloutRecord
    entry: LogEntry
    revision: str


def new_rollout(plan: RolloutPlan, configured: Ladder, by: str, why: str, now: float) -> NewRollout:
    """Return the first record of a rollout, its log entry, and the first revision: weight 0."""
    rollout_id = f"r-{secrets.token_hex(4)}"
    state = RolloutState(START.phase, since=now)
    record = RolloutRecord(
        rollout_id, plan.alias, plan.model_dump_json(), _encoded(state), state.phase.value, True, 0, by, now
    )
    entry = LogEntry(plan.alias, now, by, "start", state.phase.value, why, plan.model_dump_json(), rollout_id)
    revision = AliasRevision.of(split(state, plan), configured, plan.new, plan.old)
    return NewRollout(record, entry, revision.document())


@dataclass(frozen=True, slots=True)
class Happening:
    """An event, why it happens, who caused it and when; `figures` is JSON for the log."""

    event: Event
    why: str
    by: str
    now: float
    figures: str = "{}"


def change_of(
    record: RolloutRecord, what: Happening, ready: Readiness, configured: Ladder, others: ReplicaUse
) -> tuple[RolloutState, Change]:
    """Return the state after an event and the change to write; Refused if the event has no meaning now.

    `configured` is the ladder in the configuration. Variants that the `others`, aliases and their rollouts, use keep
    their replicas.
    """
    plan, before = read_plan(record), read_state(record)
    after = advance(before, what.event, what.why, plan, ready, what.now)
    entry = LogEntry(
        *(record.alias, what.now, what.by, what.event.value, after.phase.value, what.why, what.figures, record.id)
    )
    revision = None
    if (new := split(after, plan)) != split(before, plan):
        revision = AliasRevision.of(new, configured, plan.new, plan.old).document()
    demands = demands_of(after, plan, record.id, others)
    active = after.phase not in FINAL
    return after, Change(_encoded(after), after.phase.value, active, (entry,), revision, demands)


def demands_of(state: RolloutState, plan: RolloutPlan, rollout_id: str, others: ReplicaUse) -> tuple[Demand, ...]:
    """The replicas that a rollout wants in a phase: the new variant's from its start, the old one's to its end."""
    new, old = others.base(plan.new), others.base(plan.old)
    match state.phase:
        case Phase.STARTING if is_added(plan, others):
            return (Demand(new, old, True, rollout_id),)
        case Phase.DONE if is_replaced(plan, others):
            return (Demand(old, new, False, rollout_id),)
        case Phase.ROLLED_BACK if is_added(plan, others) and new not in others.in_use:
            return (Demand(new, old, False, rollout_id),)
    return ()


def changed_variants(plan: RolloutPlan, others: ReplicaUse) -> tuple[str, ...]:
    """The variants whose replicas a rollout may want otherwise than they are, on its way or at its end."""
    new = (others.base(plan.new),) if is_added(plan, others) else ()
    old = (others.base(plan.old),) if is_replaced(plan, others) else ()
    return (*new, *old)


def is_added(plan: RolloutPlan, others: ReplicaUse) -> bool:
    """Whether no variant of the ladder before the rollout has the replicas of the new one."""
    return others.base(plan.new) not in others.bases_of(plan.stable)


def is_replaced(plan: RolloutPlan, others: ReplicaUse) -> bool:
    """Whether nothing needs the replicas of the old variant after the rollout."""
    return others.base(plan.old) not in others.in_use | others.bases_of(plan.final)


def revision_of_split(ladder: Ladder, configured: Ladder) -> str:
    """The document of a revision with one ladder, for `undo`."""
    return AliasRevision.of(Split(ladder), configured, "", "").document()


def _encoded(state: RolloutState) -> str:
    return msgspec.json.encode(state).decode()
