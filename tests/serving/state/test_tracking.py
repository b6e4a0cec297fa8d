"""What a gateway makes of the state database, as tables."""

import dataclasses

import pytest

from serving.replica import Replica, State
from serving.state.database import Heartbeat, Owner, ReplicaRecord, Snapshot
from serving.state.tracking import Silence, TrackedReplica, effective_state, orphans, track

HERE, THERE = Owner("here-1", "here", 1), Owner("there-1", "there", 1)


def record(name: str = "int4-1", state: State = State.READY, url: str = "http://127.0.0.1:9") -> ReplicaRecord:
    """One replica's entry."""
    return ReplicaRecord(Replica(name, name.partition("-")[0], "int4", url, name), state, "said", 0.0)


def names(*entries: tuple[Owner, ReplicaRecord], keys: dict[str, str] | None = None) -> dict[str, TrackedReplica]:
    """A snapshot of these entries, as this host's gateway takes it."""
    owners = tuple(dict.fromkeys(owner for owner, _ in entries))
    snapshot = Snapshot(Heartbeat("e", 1, owners), tuple((owner.id, each) for owner, each in entries))
    return track(snapshot, {"int4", "bf16"}, keys or {}, "here")


@pytest.mark.parametrize(
    "silence, state, misses, stands, reason",
    [
        (None, State.READY, 9, State.READY, "said"),
        (None, State.STARTING, 0, State.STARTING, "said"),
        (None, State.DRAINING, 0, State.DRAINING, "said"),
        ("supervisor", State.READY, 0, State.READY, "its supervisor on here is silent"),
        ("supervisor", State.READY, 1, State.READY, "its supervisor on here is silent"),
        ("supervisor", State.READY, 2, State.FAILED, "not healthy, and its supervisor on here is silent"),
        ("supervisor", State.WARMING, 0, State.FAILED, "was warming when its supervisor on here fell silent"),
        ("supervisor", State.DRAINING, 0, State.DRAINING, "said"),
        ("supervisor", State.FAILED, 0, State.FAILED, "said"),
        ("database", State.READY, 1, State.READY, "the state database is silent"),
        ("database", State.READY, 2, State.FAILED, "not healthy, and the state database is silent"),
        ("database", State.STARTING, 0, State.STARTING, "said"),
        ("database", State.STOPPING, 0, State.STOPPING, "said"),
    ],
)
def test_standing(silence: Silence | None, state: State, misses: int, stands: State, reason: str) -> None:
    """Silence alone takes no ready replica out of rotation, and puts none in."""
    decided = effective_state(TrackedReplica(HERE, record(state=state)), silence, misses)
    assert decided.state is stands
    assert decided.reason.endswith(reason)
    assert decided.as_published == (state is stands)


def test_replicas_of_one_name() -> None:
    """The supervisor that came first keeps the name; the address goes with its own."""
    taken = names((HERE, record(url="http://127.0.0.1:1")), (THERE, record(url="http://10.0.0.2:2")))
    assert {name: each.record.replica.url for name, each in taken.items()} == {
        "int4-1": "http://127.0.0.1:1",
        "int4-1@there-1": "http://10.0.0.2:2",
    }
    assert {each.record.replica.served_name for each in taken.values()} == {"int4-1"}


def test_variants_that_the_configuration_does_not_know() -> None:
    """Labels and routes come from our configuration, so the rest is left alone."""
    assert set(names((HERE, record("fp8-1")), (HERE, record("bf16-1")))) == {"bf16-1"}


def test_keys_come_from_our_configuration() -> None:
    """By the replica's name, and for a name that we don't know by its variant."""
    keys = {"int4-1": "one", "int4": "any"}
    taken = names((HERE, record("int4-1")), (HERE, record("int4-7")), (HERE, record("bf16-1")), keys=keys)
    assert {name: each.record.replica.api_key for name, each in taken.items()} == {
        "int4-1": "one",
        "int4-7": "any",
        "bf16-1": None,
    }


@pytest.mark.parametrize(
    "owner, url, state",
    [
        (HERE, "http://127.0.0.1:9", State.READY),
        (THERE, "http://127.0.0.1:9", State.FAILED),
        (THERE, "http://[::1]:9", State.FAILED),
        (THERE, "http://10.0.0.2:9", State.READY),
    ],
)
def test_loopback_of_another_machine(owner: Owner, url: str, state: State) -> None:
    """It would lead to whoever listens there on ours."""
    (taken,) = names((owner, record(url=url))).values()
    assert taken.record.state is state
    assert ("not reachable" in taken.record.reason) == (state is State.FAILED)


@pytest.mark.parametrize(
    "state, lost, kept",
    [
        (State.READY, {"here-1"}, True),
        (State.READY, set(), False),
        (State.DRAINING, {"here-1"}, False),
        (State.STARTING, {"here-1"}, False),
    ],
)
def test_orphans(state: State, lost: set[str], kept: bool) -> None:
    """A ready replica that vanished though its owner was silent goes on; who was ended in order is gone."""
    before = names((HERE, record(state=state)))
    left = orphans(before, {}, frozenset(lost))
    assert [each.orphan for each in left.values()] == [True] * kept
    assert orphans(before, before, frozenset(lost)) == {}


def test_orphans_stay_orphans() -> None:
    """Without a record, only failed health checks remove it."""
    orphan = {"int4-1": dataclasses.replace(names((HERE, record()))["int4-1"], orphan=True)}
    assert orphans(orphan, {}, frozenset()) == orphan
