"""Supervisors and gateways meet in the state database: each side with connections and a registry of its own."""

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from serving.errors import StateAway
from serving.probe import Probe
from serving.registry import Registry
from serving.replica import Replica, ReplicaStatus, State
from serving.state.database import Owner, StateDatabase
from serving.state.follower import Follower
from serving.state.link import CALL_SECONDS, Link
from serving.state.publisher import Publisher
from tests.fakes.running import eventually, running_fake
from tests.serving.state.databases import PostgreSQL, away
from tests.serving.supervised import ready, until

KEY = "the-key"
REPLICA = Replica("int4-1", "int4", "int4", "http://127.0.0.1:9", "int4-1", KEY, 4096, "injected")
# Each side gives a call that hangs some seconds, one after the other.
PATIENCE_SECONDS = 60.0


@asynccontextmanager
async def supervisor(
    state: str, name: str = "box-1", foreign: frozenset[str] = frozenset(), call_seconds: float = CALL_SECONDS
) -> AsyncIterator[Publisher]:
    """Whoever runs replicas, without running any."""
    link = Link(StateDatabase.at(state), call_seconds)
    async with Publisher(Owner(name, "box", 1), Registry(), link, foreign) as publisher:
        yield publisher


@asynccontextmanager
async def gateway(
    state: str, silent_seconds: float = 60, call_seconds: float = CALL_SECONDS
) -> AsyncIterator[Registry]:
    """A gateway worker that follows; its registry."""
    registry = Registry()
    async with Probe() as probe:
        link = Link(StateDatabase.at(state), call_seconds)
        variants, keys = frozenset({"int4", "bf16"}), {"int4": KEY}
        async with Follower(link, registry, probe, variants, keys, "box", silent_seconds, probe_seconds=0.02):
            yield registry


async def appeared(registry: Registry, name: str = "int4-1") -> ReplicaStatus:
    """A replica's status once it is ready in a registry that may not know it yet."""
    await eventually(lambda: name in ids(registry))
    return await ready(registry, name)


def ids(registry: Registry) -> list[str]:
    """Who is in a registry."""
    return [status.replica.id for status in registry.snapshot()]


async def vanishes(publisher: Publisher) -> None:
    """The end of a process that is killed: no farewell, and no beat any more."""
    for task in publisher._tasks:
        task.cancel()
    await asyncio.gather(*publisher._tasks, return_exceptions=True)


async def test_a_replica_comes_drains_and_goes(state: str) -> None:
    """Both gateways know each step, with everything that a request needs; the key is their own."""
    async with gateway(state) as one, gateway(state) as other:
        async with supervisor(state) as publisher:
            publisher.registry.put(REPLICA, State.STARTING, "loading")
            publisher.registry.put(REPLICA, State.READY)
            for registry in (one, other):
                assert (await appeared(registry)).replica == REPLICA
            publisher.registry.move("int4-1", State.DRAINING, "asked to stop")
            for registry in (one, other):
                status = await until(registry, lambda status: status.state is State.DRAINING)
                assert status.reason == "asked to stop"
            publisher.registry.move("int4-1", State.FAILED, "crashed")
            for registry in (one, other):
                await until(registry, lambda status: status.state is State.FAILED)
            publisher.registry.remove("int4-1")
            await eventually(lambda: not ids(one) and not ids(other))
            publisher.registry.put(REPLICA, State.READY)
            await appeared(one)
        await eventually(lambda: not ids(one) and not ids(other))


async def test_a_gateway_that_comes_later_knows_at_once(state: str) -> None:
    """What is there is in the registry before the first request, since when it is so, too."""
    async with supervisor(state) as publisher:
        publisher.registry.put(REPLICA, State.READY)
        publisher.registry.put(Replica("bf16-1", "bf16", "bf16", "http://127.0.0.1:8", "x"), State.READY, "", -100.0)
        async with gateway(state) as first:
            await appeared(first, "bf16-1")
            async with gateway(state) as late:
                assert ids(late) == ["bf16-1", "int4-1"]
                assert late.status("bf16-1").since_seconds == pytest.approx(-100.0, abs=2)


async def test_a_thousand_replicas_change_as_one(state: str) -> None:
    """However many replicas change in one revision, a gateway's registry announces it once."""
    replicas = [Replica(f"int4-{number}", "int4", "int4", f"http://127.0.0.1:{number}", "x") for number in range(1000)]
    async with supervisor(state) as publisher, gateway(state) as registry:
        changes: list[int] = []
        with registry.observed(lambda: changes.append(len(registry.ready.get("int4", ())))):
            with publisher.registry.changing():
                for each in replicas:
                    publisher.registry.put(each, State.READY)
            await eventually(lambda: bool(changes))
            with publisher.registry.changing():
                for each in replicas:
                    publisher.registry.move(each.id, State.FAILED, "crashed")
            await eventually(lambda: len(changes) > 1)
        assert changes == [1000, 0]


async def test_replicas_that_others_serve_are_not_told(state: str) -> None:
    """Those with a url come from each process' own configuration."""
    async with supervisor(state, foreign=frozenset({"int4-url-1"})) as publisher, gateway(state) as registry:
        publisher.registry.put(Replica("int4-url-1", "int4", "int4", "http://10.0.0.5:8000", "x"), State.READY)
        publisher.registry.put(REPLICA, State.READY)
        await appeared(registry)
        assert ids(registry) == ["int4-1"]


async def test_out_of_rotation_means_that_every_gateway_acts_on_it(state: str) -> None:
    """When it returns, no gateway has the replica ready; without gateways there is nobody to wait for."""
    async with supervisor(state) as publisher:
        publisher.registry.put(REPLICA, State.READY)
        async with gateway(state) as one, gateway(state) as other:
            for registry in (one, other):
                await appeared(registry)
            publisher.registry.move("int4-1", State.DRAINING)
            await publisher.wait_deregistered("int4-1")
            assert [registry.status("int4-1").state for registry in (one, other)] == [State.DRAINING] * 2
        publisher.registry.remove("int4-1")
        async with asyncio.timeout(2):
            await publisher.wait_deregistered("int4-1")


async def test_a_gateway_that_has_not_read_is_waited_for(state: str, caplog: pytest.LogCaptureFixture) -> None:
    """One that beats but acts on an older revision holds `wait_deregistered`, for some seconds at most."""
    async with supervisor(state) as publisher:
        publisher.registry.put(REPLICA, State.READY)
        database = StateDatabase.at(state)
        await eventually(lambda: database.snapshot().records)
        database.acknowledge("slow", database.heartbeat().epoch, 0, 1.8e9)
        publisher.registry.move("int4-1", State.DRAINING)
        waiting = asyncio.create_task(publisher.wait_deregistered("int4-1"))
        await eventually(publisher._live_followers)
        assert not waiting.done()
        heartbeat = database.heartbeat()
        database.acknowledge("slow", heartbeat.epoch, heartbeat.revision, 1.8e9)
        await asyncio.wait_for(waiting, 2)
        assert "not every gateway" not in caplog.text
        database.acknowledge("slow", heartbeat.epoch, 0, 1.8e9)
        publisher.registry.move("int4-1", State.STOPPING)
        await publisher.wait_deregistered("int4-1")
        assert "not every gateway acknowledged that replica int4-1 is leaving" in caplog.text
        database.close()


async def test_a_silent_supervisor_s_replicas_are_asked_themselves(state: str) -> None:
    """Killed, it takes no replica out of rotation: one that answers stays, one that doesn't goes, and may come back."""
    async with running_fake() as living, running_fake() as dying, supervisor(state) as publisher:
        publisher.registry.put(Replica("int4-1", "int4", "int4", living.url, "m1"), State.READY)
        publisher.registry.put(Replica("int4-2", "int4", "int4", dying.url, "m1"), State.READY)
        publisher.registry.put(Replica("int4-3", "int4", "int4", "http://127.0.0.1:9", "m1"), State.WARMING)
        async with gateway(state, silent_seconds=1.5) as registry:
            await appeared(registry)
            await vanishes(publisher)
            await until(registry, lambda status: "its supervisor on box is silent" in status.reason)
            assert registry.status("int4-1").state is State.READY
            await until(registry, lambda status: "when its supervisor on box fell silent" in status.reason, "int4-3")
            dying.process.send_signal(signal.SIGKILL)
            await until(registry, lambda status: status.state is State.FAILED, "int4-2")
            assert registry.status("int4-1").state is State.READY


async def test_a_supervisor_that_died_long_ago_is_not_trusted(state: str) -> None:
    """A gateway that starts later finds its entries, and asks the replicas."""
    database = StateDatabase.at(state)
    async with supervisor(state) as publisher:
        publisher.registry.put(REPLICA, State.READY)
        await eventually(lambda: database.snapshot().records)
        await vanishes(publisher)
        records = [record for _, record in database.snapshot().records]
        database.publish(publisher.owner, records, 1.0)
        async with gateway(state) as registry:
            status = await until(registry, lambda status: status.state is State.FAILED)
            assert "http://127.0.0.1:9 is not healthy, and its supervisor on box is silent" in status.reason
    database.close()


async def test_a_supervisor_that_comes_back_is_heard(state: str) -> None:
    """Started again, it has the same name, and what it says replaces what its predecessor left."""
    async with running_fake() as living, gateway(state, silent_seconds=1.5) as registry:  # noqa: SIM117
        async with supervisor(state) as publisher:
            publisher.registry.put(Replica("int4-1", "int4", "int4", living.url, "m1"), State.READY)
            await appeared(registry)
            await vanishes(publisher)
            await until(registry, lambda status: "is silent" in status.reason)
            async with supervisor(state) as successor:
                successor.registry.put(Replica("int4-1", "int4", "int4", living.url, "m1"), State.READY)
                await until(registry, lambda status: status.state is State.READY and not status.reason)


async def test_a_deleted_database(tmp_path: Path) -> None:
    """Replicas stay in rotation while their supervisor writes them into the new file."""
    state = f"sqlite:///{tmp_path}/state.db"
    states: list[State] = []
    async with running_fake() as living, supervisor(state) as publisher, gateway(state) as registry:
        publisher.registry.put(Replica("int4-1", "int4", "int4", living.url, "m1"), State.READY)
        await appeared(registry)
        for path in tmp_path.glob("state.db*"):
            path.unlink()
        publisher.registry.put(REPLICA, State.WARMING)
        publisher.registry.put(Replica("int4-2", "int4", "int4", living.url, "m1"), State.READY)
        await appeared(registry, "int4-2")
        states.append(registry.status("int4-1").state)
        await until(registry, lambda status: status.state is State.WARMING)
    assert states == [State.WARMING]


async def test_an_orphan_lives_while_it_answers(tmp_path: Path) -> None:
    """With database and supervisor both gone, a replica stays as long as it is healthy, and no longer."""
    state = f"sqlite:///{tmp_path}/state.db"
    async with running_fake() as fake, supervisor(state) as publisher, gateway(state) as registry:
        publisher.registry.put(Replica("int4-1", "int4", "int4", fake.url, "m1"), State.READY)
        await appeared(registry)
        await vanishes(publisher)
        for path in tmp_path.glob("state.db*"):
            path.unlink()
        await until(registry, lambda status: "is silent" in status.reason)
        assert registry.status("int4-1").state is State.READY
        fake.process.send_signal(signal.SIGKILL)
        await eventually(lambda: not ids(registry))


async def test_a_locked_database(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody can write: replicas stay as they were, it is said once by each side, and all is well afterwards."""
    state = f"sqlite:///{tmp_path}/state.db"
    locker = StateDatabase.at(state)
    async with supervisor(state) as publisher, gateway(state) as registry:
        publisher.registry.put(REPLICA, State.READY)
        await appeared(registry)
        with locker.engine.transaction(writing=True):
            publisher.registry.put(REPLICA, State.DRAINING)
            await eventually(lambda: "replicas keep running; retrying" in caplog.text)
            await eventually(lambda: "it is readable but not writable" in caplog.text)
            assert registry.status("int4-1").state is State.READY
        await until(registry, lambda status: status.state is State.DRAINING)
        assert caplog.text.count("replicas keep running; retrying") == 1
    locker.close()


@pytest.mark.parametrize("how", ["stopped", "frozen"])
async def test_postgresql_is_away(postgresql: PostgreSQL, caplog: pytest.LogCaptureFixture, how: str) -> None:
    """Refusing or hanging, it changes nothing; what happened meanwhile is known when it is back."""
    caplog.set_level(logging.INFO)
    state = postgresql.new_database()
    async with (
        running_fake() as living,
        supervisor(state, call_seconds=1) as publisher,
        gateway(state, silent_seconds=1, call_seconds=1) as registry,
    ):
        replica = Replica("int4-1", "int4", "int4", living.url, "m1")
        publisher.registry.put(replica, State.READY)
        await appeared(registry)
        with away(postgresql, how):
            publisher.registry.put(replica, State.DRAINING)
            await eventually(lambda: "replicas keep their last state" in caplog.text, PATIENCE_SECONDS)
            await eventually(lambda: "replicas keep running; retrying" in caplog.text, PATIENCE_SECONDS)
            await until(registry, lambda status: "the state database is silent" in status.reason)
            assert registry.status("int4-1").state is State.READY
        await until(registry, lambda status: status.state is State.DRAINING)
        await eventually(lambda: caplog.text.count("is available again") == 2, PATIENCE_SECONDS)


async def test_a_database_that_hangs_holds_nobody_up(postgresql: PostgreSQL) -> None:
    """Both sides end in time though a call of each never comes back."""
    state = postgresql.new_database()
    async with asyncio.timeout(25):
        async with supervisor(state, call_seconds=1) as publisher, gateway(state, call_seconds=1) as registry:
            publisher.registry.put(REPLICA, State.READY)
            await appeared(registry)
            postgresql.signal(signal.SIGSTOP)
    postgresql.signal(signal.SIGCONT)


async def test_a_gateway_without_a_database_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says so once, goes on asking, and finds what is there as soon as there is something."""
    state = f"sqlite:///{tmp_path}/later/state.db"
    async with gateway(state) as registry:
        assert ids(registry) == []
        await eventually(lambda: caplog.text.count("unable to open database file"))
        (tmp_path / "later").mkdir()
        async with supervisor(state) as publisher:
            publisher.registry.put(REPLICA, State.READY)
            await appeared(registry)
    assert caplog.text.count("unable to open database file") == 1


async def test_one_call_at_a_time(tmp_path: Path) -> None:
    """A call that misses its deadline is an outage; the next one waits until it has ended."""
    link = Link(StateDatabase.at(f"sqlite:///{tmp_path}/state.db"), call_seconds=0.2)
    gate, order = asyncio.Event(), list[str]()
    loop = asyncio.get_running_loop()

    def slow() -> None:
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(10)
        order.append("slow")

    with pytest.raises(StateAway, match=r"no answer within 0\.2 s"):
        await link.call(slow)
    with pytest.raises(StateAway):
        await link.call(order.append, "too early")
    gate.set()
    await link.call(order.append, "in turn")
    assert order == ["slow", "in turn"]
    link.close()


async def test_no_thread_can_be_started(tmp_path: Path) -> None:
    """Such as at a limit of processes: that is an outage, too."""
    link = Link(StateDatabase.at(f"sqlite:///{tmp_path}/state.db"))
    size_bytes = threading.stack_size(2**47)  # of the address space there is no more
    try:
        with pytest.raises(StateAway, match="can't start new thread"):
            await link.call(list)
    finally:
        threading.stack_size(size_bytes)
    assert await link.call(list) == []
    link.close()


async def test_id_of_another_source_is_left_out(state: str, caplog: pytest.LogCaptureFixture) -> None:
    """A published replica whose id another source owns is logged once, and added when that source removes its own."""
    configured = Replica("int4-1", "int4", "int4", "http://127.0.0.1:8", "int4-1")
    async with supervisor(state) as publisher, gateway(state) as registry:
        source = registry.source("configuration")
        source.put(configured, State.READY)
        publisher.registry.put(REPLICA, State.READY)
        publisher.registry.put(Replica("int4-2", "int4", "int4", "http://127.0.0.1:9", "int4-2"), State.READY)
        await appeared(registry, "int4-2")
        publisher.registry.move("int4-1", State.DRAINING)
        publisher.registry.move("int4-2", State.DRAINING)
        await until(registry, lambda status: status.state is State.DRAINING, "int4-2")
        assert registry.status("int4-1").replica == configured
        assert caplog.text.count("'int4-1' belongs to the source 'configuration'") == 1
        source.remove("int4-1")
        await eventually(lambda: "int4-1" in ids(registry))
        assert registry.status("int4-1").source == "state database"
