"""What a gateway derives from the state database: local names and effective states of replicas. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from config.field_types import is_loopback
from serving.replica import PENDING, State
from serving.state.database import Owner, ReplicaRecord, Snapshot

# What has had no heartbeat for a while: the supervisor though the database answers, or the database itself.
Silence = Literal["supervisor", "database"]

MISSES = 2  # consecutive failed health checks after which a replica counts as failed


@dataclass(frozen=True, slots=True)
class TrackedReplica:
    """A replica of another process's supervisor, under its local name.

    `orphan`: the database has no record of it any more, though its supervisor did not withdraw it.
    """

    owner: Owner
    record: ReplicaRecord
    orphan: bool = False


@dataclass(frozen=True, slots=True)
class EffectiveState:
    """The state of a replica as this gateway uses it."""

    state: State
    reason: str
    as_published: bool = True


def track(snapshot: Snapshot, variants: Iterable[str], keys: Mapping[str, str], host: str) -> dict[str, TrackedReplica]:
    """Return the replicas of configured variants by local name.

    API keys come from the configuration, by replica or variant. If two supervisors have a replica of the same id, that
    of the supervisor that joined first keeps it; the other's is named `id@owner`.
    """
    known = frozenset(variants)
    tracked: dict[str, TrackedReplica] = {}
    for owner in snapshot.heartbeat.owners:
        for owner_id, record in snapshot.records:
            replica = record.replica
            if owner_id != owner.id or replica.variant not in known:
                continue
            name = f"{replica.id}@{owner.id}" if replica.id in tracked else replica.id
            key = keys.get(replica.id, keys.get(replica.variant))
            local = replace(record, replica=replace(replica, id=name, api_key=key))
            tracked[name] = TrackedReplica(owner, _with_reachability(local, owner, host))
    return tracked


def _with_reachability(record: ReplicaRecord, owner: Owner, host: str) -> ReplicaRecord:
    """Fail a replica with a loopback address on another host: here, that address is another server's."""
    address = record.replica.url.partition("://")[2].rpartition(":")[0]
    if owner.host == host or not is_loopback(address):
        return record
    reason = f"listens on {address} of {owner.host}, not reachable from {host}"
    return replace(record, state=State.FAILED, reason=reason)


def orphans(
    before: Mapping[str, TrackedReplica], now: Mapping[str, TrackedReplica], lost: frozenset[str]
) -> dict[str, TrackedReplica]:
    """Return the ready replicas without a record whose owners are `lost`: not withdrawn, so possibly still running."""
    missing = {name: replica for name, replica in before.items() if name not in now}
    return {
        name: replace(replica, orphan=True)
        for name, replica in missing.items()
        if replica.record.state is State.READY and (replica.orphan or replica.owner.id in lost)
    }


def effective_state(tracked: TrackedReplica, silence: Silence | None, misses: int) -> EffectiveState:
    """Decide the state of a replica from its record, heartbeats and health checks.

    ==================  =====================  ===========================================================
    silent              published state        effective state
    ==================  =====================  ===========================================================
    none                any                    as published
    either              ready                  as published, until `MISSES` health checks in a row fail
    supervisor          starting, warming      failed: no supervisor verifies it
    database            starting, warming      as published: its supervisor may still be verifying it
    either              any other              as published
    ==================  =====================  ===========================================================
    """
    state, reason = tracked.record.state, tracked.record.reason
    if silence is None:
        return EffectiveState(state, reason)
    source = f"its supervisor on {tracked.owner.host}" if silence == "supervisor" else "the state database"
    if state is State.READY:
        if misses >= MISSES:
            return EffectiveState(
                State.FAILED, f"{tracked.record.replica.url} is not healthy, and {source} is silent", as_published=False
            )
        return EffectiveState(State.READY, f"{source} is silent")
    if state in PENDING and silence == "supervisor":
        return EffectiveState(State.FAILED, f"was {state.value} when {source} fell silent", as_published=False)
    return EffectiveState(state, reason)
