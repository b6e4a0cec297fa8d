"""The table of replicas and its leases."""

import asyncio
from contextlib import AbstractContextManager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import NoSuchReplica
from serving.registry import Registry
from serving.replica import Replica, State

ONE = Replica("int4-1", "int4", "int4", "http://127.0.0.1:1", "int4-1")


def test_lease_counts_while_it_is_held() -> None:
    """A lease is one request in flight, until it ends, however it ends."""
    registry = Registry()
    registry.put(ONE, State.READY)
    with pytest.raises(ZeroDivisionError), registry.lease(ONE.id):
        assert registry.status(ONE.id).in_flight == 1
        raise ZeroDivisionError
    assert registry.status(ONE.id).in_flight == 0


def test_no_lease_without_a_replica() -> None:
    """A replica that left can't be leased."""
    with pytest.raises(NoSuchReplica), Registry().lease("int4-1"):
        pass


@given(st.lists(st.sampled_from(["take", "give", "leave", "come"])))
def test_counts_survive_coming_and_going(steps: list[str]) -> None:
    """Whatever leaves and comes back in between, the count is the number of leases held."""
    registry = Registry()
    registry.put(ONE, State.READY)
    held: list[AbstractContextManager[Replica]] = []
    for step in steps:
        if step == "leave":
            registry.remove(ONE.id)
        elif step == "come":
            registry.put(ONE, State.READY)
        elif step == "give" and held:
            held.pop().__exit__(None, None, None)
        elif step == "take" and registry.snapshot():
            lease = registry.lease(ONE.id)
            lease.__enter__()
            held.append(lease)
        assert [status.in_flight for status in registry.snapshot()] in ([], [len(held)])


def test_since_tells_when_the_state_began() -> None:
    """Saying the same again is no change; a new state begins now."""
    now = [10.0]
    registry = Registry(clock=lambda: now[0])
    registry.put(ONE, State.STARTING)
    now[0] = 11.0
    registry.put(ONE, State.STARTING)
    assert registry.status(ONE.id).since_seconds == 10.0
    registry.move(ONE.id, State.READY)
    assert registry.status(ONE.id).since_seconds == 11.0


async def test_idle_waits_for_the_last_lease() -> None:
    """Draining ends when nothing is in flight any more."""
    registry = Registry()
    registry.put(ONE, State.DRAINING)
    first, second = registry.lease(ONE.id), registry.lease(ONE.id)
    first.__enter__()
    second.__enter__()
    waiting = asyncio.create_task(registry.idle(ONE.id))
    first.__exit__(None, None, None)
    await asyncio.wait({waiting}, timeout=0.01)
    assert not waiting.done()
    second.__exit__(None, None, None)
    await asyncio.wait_for(waiting, 1)


async def test_a_change_wakes_everybody_who_waits() -> None:
    """Several waiters hear of one change."""
    registry = Registry()
    waiting = [asyncio.create_task(registry.changed()) for _ in range(3)]
    await asyncio.wait(waiting, timeout=0)
    registry.put(ONE, State.STARTING)
    await asyncio.wait_for(asyncio.gather(*waiting), 1)
