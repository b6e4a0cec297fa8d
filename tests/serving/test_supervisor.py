"""Faults of a replica, and the state that follows: all with real processes."""

import asyncio
import dataclasses
import os
import re
import signal
from pathlib import Path

import httpx
import pytest

from serving.errors import LaunchRefused, NoSuchReplica
from serving.machine import free_port
from serving.process import session_processes
from serving.replica import State
from tests.fakes.running import eventually, running_fake
from tests.serving.sealed import seal_directory
from tests.serving.supervised import (
    SLOW,
    launch,
    model_directory,
    noted_session,
    noted_sessions,
    ready,
    supervised,
    supervising,
    until,
)


async def test_replica_gets_ready_and_leaves_nothing(tmp_path: Path) -> None:
    """A replica starts, proves itself and answers; after the block no process and no note is left."""
    async with supervised(tmp_path, launch(tmp_path)) as registry:
        status = await ready(registry)
        assert status.replica.max_model_len_tokens == 32768
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{status.replica.url}/health")).status_code == 200
        session = noted_session(tmp_path)
    assert session_processes(session) == []
    assert list((tmp_path / "running").iterdir()) == []
    assert registry.status("int4-1").state is State.STOPPED


FAILING = ("--fake-exit-while-starting", "1", "--fake-last-words", "ValueError: no such kernel")


async def test_failed_start_is_never_given_up(tmp_path: Path) -> None:
    """A replica that dies while starting is tried again and again; the state says when, and has its own last error."""
    log = tmp_path / "logs" / "int4-1.log"
    async with supervised(tmp_path, launch(tmp_path, "int4", *FAILING)) as registry:
        status = await until(registry, lambda status: status.state is State.FAILED)
        assert re.match(r"next start at \d\d:\d\d:\d\d: ended with exit code 1 before it was ready", status.reason)
        assert "ValueError: no such kernel" in status.reason
        assert str(log) in status.reason
        await eventually(lambda: log.read_text().count("no such kernel") >= 5)


async def test_restart_ends_the_pause(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A replica that waits for its next start is started at once when that is requested, and its pauses begin anew."""
    async with supervising(tmp_path, launch(tmp_path, "int4", *FAILING), backoff=SLOW) as supervisor:
        for round_ in (1, 2, 3):
            await eventually(lambda: caplog.text.count("next start in 600 s") == round_)  # noqa: B023
            assert supervisor.restart("int4-1") == "starts again now"
        with pytest.raises(NoSuchReplica, match=r"no replica 'int4'; did you mean 'int4-1'\? known: int4-1"):
            supervisor.restart("int4")


async def test_reload_ends_the_pause(tmp_path: Path) -> None:
    """An update, even to the same configuration, starts what waits at once; what is ready is not touched."""
    second = launch(tmp_path, "bf16")
    missing = tmp_path / "missing"
    failing = launch(tmp_path, "int4", "--fake-port-file", str(missing / "port"))
    async with supervising(tmp_path, second, failing, backoff=SLOW) as supervisor:
        await ready(supervisor.registry, "bf16-1")
        await until(supervisor.registry, lambda status: "next start at" in status.reason)
        (before,) = noted_sessions(tmp_path)
        missing.mkdir()
        await supervisor.update((second, failing))
        await ready(supervisor.registry)
        assert before in noted_sessions(tmp_path)


async def test_restart_of_a_ready_replica_drains_it_first(tmp_path: Path) -> None:
    """A ready replica finishes its requests, stops, and is started again under the same name."""
    async with supervising(tmp_path, launch(tmp_path)) as supervisor:
        registry = supervisor.registry
        await ready(registry)
        before = noted_session(tmp_path)
        registry.take("int4-1")
        assert supervisor.restart("int4-1") == "finishes its requests (at most 5 s), then starts again"
        await until(registry, lambda status: status.state is State.DRAINING)
        assert "is draining already" in supervisor.restart("int4-1")
        assert session_processes(before)
        registry.give_back("int4-1")
        await until(registry, lambda status: status.state is State.STARTING)
        await ready(registry)
        assert session_processes(before) == []
        assert noted_session(tmp_path) != before


async def test_too_slow_a_start_is_a_failure(tmp_path: Path) -> None:
    """A replica that isn't ready in time is ended."""
    slow = launch(tmp_path, "int4", "--fake-start-delay", "60", start_timeout_seconds=0.3)
    async with supervised(tmp_path, slow, backoff=SLOW) as registry:
        status = await until(registry, lambda status: status.state is State.FAILED)
        assert "not ready after 0.3 s" in status.reason
        await eventually(lambda: not list((tmp_path / "running").iterdir()))


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
async def test_crash_restarts(tmp_path: Path, caplog: pytest.LogCaptureFixture, sent: signal.Signals) -> None:
    """An unrequested exit, with code 0 too, is a crash: out of rotation, cleaned up, started again at once."""
    async with supervised(tmp_path, launch(tmp_path, "int4", "--fake-spawn-child")) as registry:
        await ready(registry)
        first = noted_session(tmp_path)
        os.kill(first, sent)
        await eventually(lambda: "crashed with exit code" in caplog.text)
        await ready(registry)
        assert noted_session(tmp_path) != first
        assert session_processes(first) == []


async def test_engine_death_with_code_0_is_a_crash(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """vLLM leaves with code 0 when its engine dies; that is no orderly exit."""
    async with supervised(tmp_path, launch(tmp_path, "int4", "--fake-crash-after-requests", "1")) as registry:
        replica = (await ready(registry)).replica
        async with httpx.AsyncClient() as client:
            body = {"model": replica.served_name, "prompt": "x"}
            assert (await client.post(f"{replica.url}/v1/completions", json=body)).status_code == 500
        await eventually(lambda: "crashed with exit code 0" in caplog.text)


async def test_stop_is_kept_even_if_sigterm_is_ignored(tmp_path: Path) -> None:
    """A replica that ignores SIGTERM while it starts is killed, children included."""
    stubborn = launch(tmp_path, "int4", "--fake-ignore-sigterm", "--fake-start-delay", "60", "--fake-spawn-child")
    async with supervised(tmp_path, stubborn) as registry:
        await until(registry, lambda status: "loading" in status.reason)
        session = noted_session(tmp_path)
    assert session_processes(session) == []


async def test_drain_waits_for_requests(tmp_path: Path) -> None:
    """Stopping takes a replica out of rotation first and lets what is in flight finish."""
    async with supervised(tmp_path, launch(tmp_path)) as registry:
        await ready(registry)
        registry.take("int4-1")
        session = noted_session(tmp_path)

        async def finish() -> None:
            await until(registry, lambda status: status.state is State.DRAINING)
            assert session_processes(session)
            registry.give_back("int4-1")

        finishing = asyncio.create_task(finish())
    await finishing
    assert session_processes(session) == []


async def test_one_start_at_a_time(tmp_path: Path) -> None:
    """The second replica begins to load only when the first is ready."""
    launches = (launch(tmp_path, "bf16", "--fake-start-delay", "0.2"), launch(tmp_path, "int4"))
    async with supervised(tmp_path, *launches) as registry:
        await until(registry, lambda status: "loading" in status.reason, "bf16-1")
        assert "waiting for its turn" in registry.status("int4-1").reason
        await ready(registry, "int4-1")
        assert registry.status("bf16-1").state is State.READY


async def test_wrong_server_behind_the_port_is_not_accepted(tmp_path: Path) -> None:
    """A replica must serve its own directory under its own name; something else on its port is a failure."""
    wrong = launch(tmp_path, "int4", "--model", str(model_directory(tmp_path / "other")))
    async with supervised(tmp_path, wrong, backoff=SLOW) as registry:
        status = await until(registry, lambda status: status.state is State.FAILED)
        assert "not this replica" in status.reason


async def test_port_in_use_is_refused(tmp_path: Path) -> None:
    """A configured port that somebody has is told before anything is started."""
    async with running_fake() as other:
        busy = launch(tmp_path, "int4", port=other.port)
        with pytest.raises(LaunchRefused, match=f"port {other.port} is in use"):
            async with supervised(tmp_path, busy):
                pass
    assert not list(tmp_path.glob("running/*"))


async def test_configured_port_is_used(tmp_path: Path) -> None:
    """A replica with a port answers there."""
    port = free_port()
    async with supervised(tmp_path, launch(tmp_path, port=port)) as registry:
        assert (await ready(registry)).replica.url == f"http://127.0.0.1:{port}"


async def test_a_variant_with_a_changed_byte_is_never_served(tmp_path: Path) -> None:
    """Its engine is not even started; the state tells the file. With the sealed bytes back it serves."""
    planned = launch(tmp_path)
    assert planned.variant.path
    weights = planned.variant.path / "model.safetensors"
    weights.write_bytes(b"weights")
    sealed = dataclasses.replace(planned.variant, manifest=seal_directory(planned.variant.path))
    planned = dataclasses.replace(planned, variant=sealed)
    weights.write_bytes(b"Weights")
    async with supervised(tmp_path, planned, backoff=SLOW) as registry:
        status = await until(registry, lambda status: status.state is State.FAILED)
        assert "checksum mismatch: model.safetensors" in status.reason
        assert not (tmp_path / "logs").exists()
    weights.write_bytes(b"weights")
    async with supervised(tmp_path, planned) as registry:
        await ready(registry)
