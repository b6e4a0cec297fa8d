"""Values of rollouts in the state database. Plans, states, revisions and figures are JSON of gateway.rollout."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RolloutRecord:
    """A rollout; `version` counts its changes, so that a change of an older version is refused."""

    id: str
    alias: str
    plan: str
    state: str
    phase: str
    active: bool
    version: int
    started_by: str
    started_at: float


@dataclass(frozen=True, slots=True)
class RevisionRecord:
    """An immutable revision of an alias."""

    alias: str
    number: int
    document: str
    cause: str
    created_by: str
    created_at: float
    rollout: str | None = None


@dataclass(frozen=True, slots=True)
class LogEntry:
    """An entry of the audit log; `figures` is JSON. `seq` is 0 until it is written."""

    alias: str
    at: float
    by: str
    event: str
    phase: str
    why: str
    figures: str = "{}"
    rollout: str | None = None
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a rollout: its new state, log entries, and the alias' new revision, if that changes."""

    state: str
    phase: str
    active: bool
    entries: tuple[LogEntry, ...]
    revision: str | None = None
    demands: tuple["Demand", ...] = ()


@dataclass(frozen=True, slots=True)
class Demand:
    """Whether replicas of a variant are to run, launched like those that are configured for another one."""

    variant: str
    modeled_on: str
    run: bool
    rollout: str


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """What a worker saw in a block of time; `document` is JSON."""

    rollout: str
    worker: str
    block: int
    at: float
    document: str


@dataclass(frozen=True, slots=True)
class DrawRecord:
    """The arm that a conversation, known by a hash of 63 bits, was drawn to, and in which step."""

    conversation: int
    arm: str
    step: int


@dataclass(frozen=True, slots=True)
class RolloutSnapshot:
    """What gateways follow, at one revision: active rollouts, the latest revision of each alias, wanted replicas."""

    epoch: str
    revision: int
    active: tuple[RolloutRecord, ...]
    aliases: tuple[RevisionRecord, ...]
    demands: tuple[Demand, ...]


EMPTY = RolloutSnapshot("", 0, (), (), ())
