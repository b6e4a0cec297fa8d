"""The registry of replicas: ownership of entries, and counts of requests in flight."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import NoSuchReplica, ReplicaConflict
from serving.registry import Registry, ReplicaSource
from serving.replica import DIRECT, Replica, State

ONE = Replica("int4-1", "int4", "int4", "http://127.0.0.1:1", "int4-1")
TWO = Replica("int4-2", "int4", "int4", "http://127.0.0.1:2", "int4-2")

# Calls of the source "configuration", by name.
CALLS: dict[str, Callable[[ReplicaSource], None]] = {
    "put": lambda source: source.put(ONE, State.FAILED, "changed"),
    "move": lambda source: source.move(ONE.id, State.FAILED, "changed"),
    "remove": lambda source: source.remove(ONE.id),
    "keep_only nothing": lambda source: source.keep_only(()),
    "keep_only it": lambda source: source.keep_only({ONE.id}),
}
CONFLICT = (
    "replica 'int4-1' belongs to the source 'supervisor', so the source 'configuration' cannot add or change it; "
    "rename its variant in one of the two"
)


def entries(registry: Registry) -> list[tuple[str, str, State]]:
    """Id, source and state of every replica."""
    return [(status.replica.id, status.source, status.state) for status in registry.snapshot()]


@pytest.mark.parametrize("name", ["configuration", DIRECT])
@pytest.mark.parametrize(
    "call,state",
    [
        ("put", State.FAILED),
        ("move", State.FAILED),
        ("remove", None),
        ("keep_only nothing", None),
        ("keep_only it", State.READY),
    ],
)
def test_source_writes_its_own_replicas(name: str, call: str, state: State | None) -> None:
    """A source changes and removes its own replicas; `keep_only` removes those that are not listed."""
    registry = Registry()
    registry.source(name).put(ONE, State.READY)
    CALLS[call](registry.source(name))
    assert entries(registry) == ([] if state is None else [(ONE.id, name, state)])


@pytest.mark.parametrize(
    "call,conflicts",
    [
        ("put", True),
        ("move", True),
        ("remove", False),
        ("keep_only nothing", False),
        ("keep_only it", False),
    ],
)
def test_source_leaves_replicas_of_others_alone(call: str, conflicts: bool) -> None:
    """Another source's replica stays as it is: `put` and `move` are errors, `remove` and `keep_only` have no effect."""
    registry = Registry()
    registry.source("supervisor").put(ONE, State.READY)
    source = registry.source("configuration")
    source.put(TWO, State.READY)
    if conflicts:
        with pytest.raises(ReplicaConflict) as conflict:
            CALLS[call](source)
        assert str(conflict.value) == CONFLICT
    else:
        CALLS[call](source)
    assert entries(registry)[0] == (ONE.id, "supervisor", State.READY)
    assert [owner for _, owner, _ in entries(registry)[1:]] == ([] if call.startswith("keep_only") else [source.name])


@pytest.mark.parametrize("call", CALLS)
def test_source_without_replicas(call: str) -> None:
    """`put` adds an unknown replica, `move` of one is an error, removing it has no effect."""
    registry = Registry()
    source = registry.source("configuration")
    if call == "move":
        with pytest.raises(NoSuchReplica, match="'int4-1' is not in the registry"):
            CALLS[call](source)
    else:
        CALLS[call](source)
    assert entries(registry) == ([(ONE.id, "configuration", State.FAILED)] if call == "put" else [])


@pytest.mark.parametrize("call", ["put", "move", "remove"])
def test_calls_without_a_handle_own_their_replicas(call: str) -> None:
    """Methods of the registry itself write as a source of their own, which owns no other source's replica."""
    registry = Registry()
    registry.source("supervisor").put(ONE, State.READY)
    calls: dict[str, Callable[[], None]] = {
        "put": lambda: registry.put(ONE, State.FAILED),
        "move": lambda: registry.move(ONE.id, State.FAILED),
        "remove": lambda: registry.remove(ONE.id),
    }
    if call == "remove":
        calls[call]()
    else:
        with pytest.raises(ReplicaConflict, match="the source 'direct' cannot"):
            calls[call]()
    assert entries(registry) == [(ONE.id, "supervisor", State.READY)]


def test_id_passes_to_the_next_source() -> None:
    """After its source removed a replica, another one may add the id; a late removal by the first has no effect."""
    registry = Registry()
    first, second = registry.source("supervisor"), registry.source("configuration")
    first.put(ONE, State.READY)
    registry.take(ONE.id)
    first.remove(ONE.id)
    second.put(ONE, State.STARTING)
    first.remove(ONE.id)
    first.keep_only(())
    with pytest.raises(ReplicaConflict, match="belongs to the source 'configuration'"):
        first.put(ONE, State.READY)
    assert entries(registry) == [(ONE.id, "configuration", State.STARTING)]
    assert registry.status(ONE.id).in_flight == 1


def test_refused_put_is_no_change() -> None:
    """Observers are not called for a call that the registry rejects or ignores."""
    registry = Registry()
    registry.source("supervisor").put(ONE, State.READY)
    changes: list[None] = []
    with registry.observed(lambda: changes.append(None)):
        with pytest.raises(ReplicaConflict):
            registry.put(ONE, State.FAILED)
        registry.remove(ONE.id)
        registry.source("configuration").keep_only(())
    assert changes == []
    assert registry.ready == {"int4": (ONE,)}


def test_take_needs_a_replica() -> None:
    """A replica that is not in the registry cannot be leased."""
    with pytest.raises(NoSuchReplica):
        Registry().take("int4-1")


@given(st.lists(st.sampled_from(["take", "give back", "leave", "return"])))
def test_counts_survive_leaving_and_returning(steps: list[str]) -> None:
    """A replica may leave and return at any time: its count is the number of requests that were not given back."""
    registry = Registry()
    registry.put(ONE, State.READY)
    in_flight = 0
    for step in steps:
        if step == "leave":
            registry.remove(ONE.id)
        elif step == "return":
            registry.put(ONE, State.READY)
        elif step == "give back" and in_flight:
            registry.give_back(ONE.id)
            in_flight -= 1
        elif step == "take" and registry.snapshot():
            assert registry.take(ONE.id) == ONE
            in_flight += 1
        assert [status.in_flight for status in registry.snapshot()] in ([], [in_flight])
        assert registry.in_flight == ({ONE.id: in_flight} if in_flight else {})


def test_since_is_the_beginning_of_the_state() -> None:
    """An identical put is no change; a new state begins now."""
    now = [10.0]
    registry = Registry(clock=lambda: now[0])
    registry.put(ONE, State.STARTING)
    now[0] = 11.0
    registry.put(ONE, State.STARTING)
    assert registry.status(ONE.id).since_seconds == 10.0
    registry.move(ONE.id, State.READY)
    assert registry.status(ONE.id).since_seconds == 11.0


async def test_idle_waits_for_the_last_request() -> None:
    """`idle` returns when no request is in flight any more."""
    registry = Registry()
    registry.put(ONE, State.DRAINING)
    registry.take(ONE.id)
    registry.take(ONE.id)
    waiting = asyncio.create_task(registry.idle(ONE.id))
    registry.give_back(ONE.id)
    await asyncio.wait({waiting}, timeout=0.01)
    assert not waiting.done()
    registry.give_back(ONE.id)
    await asyncio.wait_for(waiting, 1)


async def test_a_change_wakes_all_waiters() -> None:
    """Several tasks wait for the same change."""
    registry = Registry()
    waiting = [asyncio.create_task(registry.changed()) for _ in range(3)]
    await asyncio.wait(waiting, timeout=0)
    registry.put(ONE, State.STARTING)
    await asyncio.wait_for(asyncio.gather(*waiting), 1)


def test_changes_of_a_block_are_announced_as_one() -> None:
    """Observers see the registry as it is at the end of the block, once; a block without a change is silent."""
    registry, seen = Registry(), list[list[str]]()
    with registry.observed(lambda: seen.append([each.id for each in registry.ready.get("int4", ())])):
        with registry.changing():
            registry.put(ONE, State.READY)
            with registry.source(DIRECT).changing():
                registry.put(TWO, State.READY)
            assert seen == []
        with registry.changing():
            pass
        registry.remove(ONE.id)
    assert seen == [["int4-1", "int4-2"], ["int4-2"]]


def test_a_block_that_fails_announces_what_it_changed() -> None:
    """The next change is announced as usual."""
    registry, seen = Registry(), list[int]()
    with registry.observed(lambda: seen.append(len(registry.ready.get("int4", ())))):
        with pytest.raises(NoSuchReplica), registry.changing():
            registry.put(ONE, State.READY)
            registry.move(TWO.id, State.FAILED)
        registry.put(TWO, State.READY)
    assert seen == [1, 2]
