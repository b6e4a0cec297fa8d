"""What a gateway makes of what it read in the state database: names, standing, who counts as silent. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from config.schema import is_loopback
from serving.replica import PENDING, State
from serving.state.database import Owner, Picture, Told

# Who has not been heard for a while: the supervisor though the database answers, or the database itself.
Silence = Literal["supervisor", "database"]

MISSES = 2  # so often in a row a replica does not answer us before we believe it


@dataclass(frozen=True, slots=True)
class Followed:
    """A replica that somebody else runs, under the name it has here.

    `orphan`: the database does not tell of it any more, but nobody has ended it in order, either.
    """

    owner: Owner
    told: Told
    orphan: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """How a replica stands in our rotation."""

    state: State
    reason: str
    as_told: bool = True


def followed(picture: Picture, variants: Iterable[str], keys: Mapping[str, str], host: str) -> dict[str, Followed]:
    """Name every replica of a picture that this gateway's configuration can use.

    Keys come from our own configuration. Two supervisors may both have an `int4-1`: the one that came first keeps the
    name here, the other's gets its owner's behind it.
    """
    known = frozenset(variants)
    named: dict[str, Followed] = {}
    for owner in picture.pulse.owners:
        for owner_id, told in picture.told:
            replica = told.replica
            if owner_id != owner.id or replica.variant not in known:
                continue
            name = f"{replica.id}@{owner.id}" if replica.id in named else replica.id
            key = keys.get(replica.id, keys.get(replica.variant))
            ours = replace(told, replica=replace(replica, id=name, api_key=key))
            named[name] = Followed(owner, _reachable(ours, owner, host))
    return named


def _reachable(told: Told, owner: Owner, host: str) -> Told:
    """A loopback address of another machine would lead to whoever listens there on ours."""
    there = told.replica.url.partition("://")[2].rpartition(":")[0]
    if owner.host == host or not is_loopback(there):
        return told
    return replace(told, state=State.FAILED, reason=f"listens on {there} of {owner.host}, out of reach from {host}")


def orphans(before: Mapping[str, Followed], now: Mapping[str, Followed], lost: frozenset[str]) -> dict[str, Followed]:
    """Keep the ready replicas that vanished without an orderly end: their owners are among the `lost`."""
    gone = {name: each for name, each in before.items() if name not in now}
    return {
        name: replace(each, orphan=True)
        for name, each in gone.items()
        if each.told.state is State.READY and (each.orphan or each.owner.id in lost)
    }


def standing(each: Followed, silence: Silence | None, misses: int) -> Standing:
    """Decide how a replica stands.

    ==================  =====================  ==========================================================
    silent              it was told to be      it stands
    ==================  =====================  ==========================================================
    nobody              anything               as told
    anybody             ready                  as told, until it doesn't answer us `MISSES` times in a row
    the supervisor      starting, warming      failed: nobody is there to verify it
    the database        starting, warming      as told: its supervisor may well be at it
    anybody             anything else          as told
    ==================  =====================  ==========================================================
    """
    state, reason = each.told.state, each.told.reason
    if silence is None:
        return Standing(state, reason)
    who = f"its supervisor on {each.owner.host}" if silence == "supervisor" else "the state database"
    if state is State.READY:
        if misses >= MISSES:
            return Standing(State.FAILED, f"{each.told.replica.url} is not healthy, and {who} is silent", as_told=False)
        return Standing(State.READY, f"{who} is silent")
    if state in PENDING and silence == "supervisor":
        return Standing(State.FAILED, f"was {state.value} when {who} fell silent", as_told=False)
    return Standing(state, reason)
