"""Going over to other launches while replicas answer."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from config.schema import ReplicaSettings
from serving.errors import LaunchRefused, ReplicaConflict, UpdateFailed
from serving.machine import free_port
from serving.replica import Launch, Replica, State
from serving.supervisor import Supervisor
from tests.fakes.running import eventually
from tests.serving.supervised import SLOW, launch, noted_session, noted_sessions, ready, supervising


def states(supervisor: Supervisor) -> dict[str, State]:
    """Every replica's state."""
    return {status.replica.id: status.state for status in supervisor.registry.snapshot()}


def with_settings(given: Launch, **settings: object) -> Launch:
    """The same launch with other settings."""
    values = {**given.settings.model_dump(), **settings}
    return replace(given, settings=ReplicaSettings.model_validate(values))


async def test_successor_is_ready_before_the_old_one_drains(tmp_path: Path) -> None:
    """There is always a replica that answers, and afterwards only the new one and its process."""
    old = launch(tmp_path)
    async with supervising(tmp_path, old) as supervisor:
        await ready(supervisor.registry)
        before = noted_session(tmp_path)
        supervisor.registry.take("int4-1")
        update = asyncio.create_task(supervisor.update((with_settings(old, max_num_seqs=2),)))
        await eventually(lambda: states(supervisor).get("int4-1") is State.DRAINING)
        assert states(supervisor) == {"int4-1": State.DRAINING, "int4-1b": State.READY}
        assert not update.done()
        supervisor.registry.give_back("int4-1")
        await update
        assert states(supervisor) == {"int4-1b": State.READY}
        assert noted_session(tmp_path) != before
        await supervisor.update((with_settings(old, max_num_seqs=3),))
        assert states(supervisor) == {"int4-1": State.READY}


async def test_id_of_another_source_stops_the_update(tmp_path: Path) -> None:
    """A launch whose id another source owns is not started; what runs keeps running."""
    old = launch(tmp_path)
    other = Replica("bf16-1", "bf16", "bf16", "http://127.0.0.1:1", "bf16-1")
    async with supervising(tmp_path, old) as supervisor:
        await ready(supervisor.registry)
        supervisor.registry.source("configuration").put(other, State.FAILED)
        with pytest.raises(ReplicaConflict, match="'bf16-1' belongs to the source 'configuration'"):
            await supervisor.update((old, launch(tmp_path, "bf16")))
        assert states(supervisor) == {"bf16-1": State.FAILED, "int4-1": State.READY}
        supervisor.registry.source("configuration").remove("bf16-1")
        await supervisor.update((old, launch(tmp_path, "bf16")))
        assert states(supervisor) == {"bf16-1": State.READY, "int4-1": State.READY}


async def test_pinned_port_is_replaced_in_place(tmp_path: Path) -> None:
    """Where two can't be, the old one goes first, and the new one answers at the same address."""
    old = launch(tmp_path, port=free_port())
    async with supervising(tmp_path, old) as supervisor:
        url = (await ready(supervisor.registry)).replica.url
        await supervisor.update((with_settings(old, max_num_seqs=2),))
        assert states(supervisor) == {"int4-1": State.READY}
        assert supervisor.registry.status("int4-1").replica.url == url


async def test_failing_successor_leaves_the_old_one(tmp_path: Path) -> None:
    """An update to something that doesn't start stops there, and says why; what ran goes on."""
    old = launch(tmp_path)
    broken = with_settings(old, args=("--fake-exit-while-starting", "1", "--fake-last-words", "ValueError: no kernel"))
    async with supervising(tmp_path, old, start_attempts=2) as supervisor:
        await ready(supervisor.registry)
        before = noted_session(tmp_path)
        with pytest.raises(UpdateFailed, match=r"int4-1b does not start: .*ValueError: no kernel"):
            await supervisor.update((broken,))
        assert states(supervisor) == {"int4-1": State.READY}
        assert noted_session(tmp_path) == before


async def test_refused_update_touches_nothing(tmp_path: Path) -> None:
    """A launch that can't succeed is refused before anything is started or stopped."""
    old = launch(tmp_path)
    async with supervising(tmp_path, old) as supervisor:
        await ready(supervisor.registry)
        assert old.variant.path
        nowhere = replace(old, variant=replace(old.variant, path=old.variant.path / "nowhere"))
        with pytest.raises(LaunchRefused, match="nowhere"):
            await supervisor.update((nowhere,))
        assert states(supervisor) == {"int4-1": State.READY}


async def test_fleet_grows_and_shrinks(tmp_path: Path) -> None:
    """New replicas are added before those that nobody wants go."""
    first, second = launch(tmp_path, "int4"), launch(tmp_path, "bf16")
    async with supervising(tmp_path, first) as supervisor:
        await ready(supervisor.registry)
        await supervisor.update((first, second))
        assert states(supervisor) == {"bf16-1": State.READY, "int4-1": State.READY}
        await supervisor.update((second,))
        assert states(supervisor) == {"bf16-1": State.READY}
        await supervisor.update(())
        assert states(supervisor) == {}
        assert noted_sessions(tmp_path) == set()


async def test_a_replica_without_room_is_not_started(tmp_path: Path) -> None:
    """A new replica that memory does not hold beside the others says so, and what runs keeps its memory."""
    old, large = launch(tmp_path), launch(tmp_path, "bf16", kv_cache_bytes="4000GiB")
    async with supervising(tmp_path, old, start_attempts=1) as supervisor:
        await ready(supervisor.registry)
        with pytest.raises(UpdateFailed, match=r"bf16-1 does not start: .*replicas need about 4001\.\d GiB of memory"):
            await supervisor.update((old, large))
        assert states(supervisor) == {"int4-1": State.READY}
        assert not (tmp_path / "logs" / "bf16-1.log").exists()


async def test_update_while_a_replica_cannot_start(tmp_path: Path) -> None:
    """One that waits for its next start is replaced by what works."""
    broken = launch(tmp_path, "int4", "--fake-exit-while-starting", "1")
    async with supervising(tmp_path, broken, backoff=SLOW) as supervisor:
        await eventually(lambda: states(supervisor)["int4-1"] is State.FAILED)
        await supervisor.update((with_settings(broken, args=()),))
        assert states(supervisor) == {"int4-1b": State.READY}


async def test_changed_times_replace_nothing(tmp_path: Path) -> None:
    """Another drain time holds for the replica that runs: a request that would take longer is cut off after it."""
    old = launch(tmp_path, drain_seconds=600)
    async with supervising(tmp_path, old) as supervisor:
        await ready(supervisor.registry)
        before = noted_session(tmp_path)
        await supervisor.update((with_settings(old, drain_seconds=0.1),))
        assert noted_session(tmp_path) == before
        supervisor.registry.take("int4-1")
        async with asyncio.timeout(60):
            await supervisor.update(())
        assert states(supervisor) == {}
