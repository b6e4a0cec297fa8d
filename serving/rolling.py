"""The next step of a rolling update, from running to wanted launches: a pure decision, made again after every step.

Surge: the successor becomes ready first, then the old replica stops. Where both cannot run at once (their GPUs or
ports overlap), the least loaded stops first, one at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from serving.identity import launch_digest, slot_of
from serving.replica import Launch


@dataclass(frozen=True, slots=True)
class Current:
    """A replica that runs, starts or waits for its next start."""

    launch: Launch
    ready: bool
    in_flight: int


@dataclass(frozen=True, slots=True)
class Start:
    """Start what nothing runs for yet."""

    launch: Launch


@dataclass(frozen=True, slots=True)
class Replace:
    """Put a launch in a replica's place; `surge`: it gets ready before the old one goes."""

    replica_id: str
    launch: Launch
    surge: bool


@dataclass(frozen=True, slots=True)
class Retire:
    """Drain and stop a replica that is not configured any more."""

    replica_id: str


Step = Start | Replace | Retire


def next_step(running: Sequence[Current], wanted: Sequence[Launch]) -> Step | None:
    """Return the next step, or None if the wanted launches run."""
    slots = {slot_of(each.launch.replica_id): each for each in running}
    unwanted = [each for each in running if slot_of(each.launch.replica_id) not in {want.replica_id for want in wanted}]
    for launch in wanted:
        if launch.replica_id not in slots and not _clashes(launch, running):
            return Start(launch)
    outdated = [
        (slots[launch.replica_id], launch)
        for launch in wanted
        if launch.replica_id in slots and launch_digest(slots[launch.replica_id].launch) != launch_digest(launch)
    ]
    if outdated:
        return _replacement(outdated, running, unwanted)
    return Retire(_gentlest(unwanted).launch.replica_id) if unwanted else None


def _replacement(
    outdated: Sequence[tuple[Current, Launch]], running: Sequence[Current], unwanted: Sequence[Current]
) -> Step:
    """The least_loaded replacement that has room; without any, room is made."""
    ordered = sorted(outdated, key=lambda pair: _burden(pair[0]))
    for old, launch in ordered:
        if not _clashes(launch, running):
            return Replace(old.launch.replica_id, launch, surge=True)
    for old, launch in ordered:
        if not _clashes(launch, [each for each in running if each is not old]):
            return Replace(old.launch.replica_id, launch, surge=False)
    if unwanted:
        return Retire(_gentlest(unwanted).launch.replica_id)
    # Replicas that trade places: one has to go before any can come.
    return Retire(ordered[0][0].launch.replica_id)


def _clashes(launch: Launch, running: Sequence[Current]) -> bool:
    """Return whether a running replica holds a GPU or the port that a launch needs."""
    return any(
        set(launch.gpus) & set(each.launch.gpus) or (launch.port is not None and launch.port == each.launch.port)
        for each in running
    )


def _burden(current: Current) -> tuple[bool, int, str]:
    """Order replicas for replacement: those that are not ready first, then by the number of requests."""
    return current.ready, current.in_flight, current.launch.replica_id


def _gentlest(running: Sequence[Current]) -> Current:
    return min(running, key=_burden)
