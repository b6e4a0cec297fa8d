"""Faults of a replica that was ready, or that can't get ready, and the states that follow: one row each."""

import asyncio
import dataclasses
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from config.golden import GoldenAnswer
from config.measurements import EVALUATION_FILE
from serving.backoff import Backoff
from serving.machine import free_port
from serving.process import session_processes
from serving.replica import Replica, State
from tests.fakes.running import eventually, wait_until
from tests.serving.supervised import (
    SLOW,
    launch,
    noted_session,
    noted_sessions,
    ready,
    supervised,
    supervising,
    until,
)

GOLDEN = {"ids": [65, 66, 67, 68], "variant": [-1.5, -2.5, -0.5], "parent": [-1.0, -2.0, -0.25]}


@asynccontextmanager
async def asking(replica: Replica, **body: Any) -> AsyncIterator[asyncio.Task[httpx.Response]]:
    """A request to a replica that is under way during the block."""
    asked = {"model": replica.served_name, "prompt": "x", **body}
    async with httpx.AsyncClient(timeout=30) as client:
        task = asyncio.create_task(client.post(f"{replica.url}/v1/completions", json=asked))
        try:
            yield task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, httpx.HTTPError):
                await task


async def test_hanging_replica_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It answers /health, has a request, and no token comes: out of rotation, ended, started again."""
    hanging = launch(tmp_path, "int4", "--fake-stall-after-tokens", "1", "--fake-tokens", "4", hang_seconds=0.4)
    async with supervising(tmp_path, hanging, patience_seconds=0.2) as supervisor:
        replica = (await ready(supervisor.registry)).replica
        first = noted_session(tmp_path)
        async with asking(replica):
            await eventually(lambda: "hangs: it has requests, and no token came for 0.4 s" in caplog.text)
            await eventually(lambda: noted_sessions(tmp_path) not in (set(), {first}))
        await ready(supervisor.registry)
        assert session_processes(first) == []


async def test_idle_replica_does_not_hang(tmp_path: Path) -> None:
    """Nothing to do is no reason to be replaced, however often one looks."""
    asked = tmp_path / "asked"
    idle = launch(tmp_path, "int4", "--fake-log-requests", str(asked), hang_seconds=0.05)
    async with supervised(tmp_path, idle) as registry:
        await ready(registry)
        session = noted_session(tmp_path)
        await eventually(lambda: asked.read_text().count('"/metrics"') > 20)
        assert noted_session(tmp_path) == session
        assert registry.status("int4-1").state is State.READY


async def test_crash_in_the_middle_of_a_stream(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The engine dies under a request: the client gets an error, the replica is failed and then ready again."""
    async with supervised(tmp_path, launch(tmp_path, "int4", "--fake-crash-after-requests", "1")) as registry:
        replica = (await ready(registry)).replica
        async with asking(replica, stream=True) as task:
            assert b"EngineCore encountered an issue" in (await task).content
        await eventually(lambda: "crashed with exit code 0" in caplog.text)
        await ready(registry)


async def test_crashes_in_a_row_back_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first crash restarts at once, the second after a pause that is told."""
    crashing = launch(tmp_path, "int4", "--fake-crash-after-requests", "1")
    async with supervised(tmp_path, crashing, backoff=Backoff(first_seconds=0.05)) as registry:
        await ready(registry)
        for pause in ("0 s", "0.05 s", "0.1 s"):
            replica = (await ready(registry)).replica
            async with asking(replica) as task:
                await task
            await eventually(partial(_told, caplog, f"next start in {pause}"))


async def test_sigterm_ignored_at_the_end(tmp_path: Path) -> None:
    """A ready replica that doesn't leave is killed, whole, when patience is over."""
    stubborn = launch(tmp_path, "int4", "--fake-ignore-sigterm", "--fake-spawn-child")
    async with supervising(tmp_path, stubborn, patience_seconds=0.2) as supervisor:
        await ready(supervisor.registry)
        session = noted_session(tmp_path)
        assert len(session_processes(session)) == 2
    assert session_processes(session) == []
    assert supervisor.registry.status("int4-1").state is State.STOPPED


async def test_request_that_never_ends_is_cut_at_the_deadline(tmp_path: Path) -> None:
    """Draining waits for requests in the engine, no longer than it may; then the client gets an end."""
    stalling = launch(tmp_path, "int4", "--fake-stall-after-tokens", "1", "--fake-tokens", "4", drain_seconds=0.3)
    async with supervising(tmp_path, stalling, patience_seconds=0.2) as supervisor:
        replica = (await ready(supervisor.registry)).replica
        session = noted_session(tmp_path)
        async with asking(replica) as task:

            async def generating() -> bool:
                return bool((await supervisor.probe.activity(replica)).requests)

            await eventually(generating)
            await supervisor.update(())
            assert session_processes(session) == []
            with pytest.raises(httpx.HTTPError):
                await task


async def test_port_taken_while_a_replica_was_down(tmp_path: Path) -> None:
    """Another process got the port: the state says so, and when it is tried again."""
    port = free_port()
    async with supervised(tmp_path, launch(tmp_path, "int4", port=port), backoff=SLOW) as registry:
        await ready(registry)
        os.killpg(noted_session(tmp_path), signal.SIGKILL)
        with _taken(port):
            status = await until(registry, lambda status: f"port {port} is in use" in status.reason)
    assert "next start at" in status.reason


@pytest.mark.parametrize(
    "args,settings,cause",
    [
        (("--fingerprint-value", "another"), {}, "calls itself 'another', not 'int4'"),
        (("--max-model-len", "4096"), {"max_model_len": 8192}, "max_model_len is 4096, not 8192"),
        (("--fake-logprob-shift", "0.4"), {}, "golden prompt: this is not int4"),
        (("--fake-fail-first", "9", "--fake-fail-status", "500"), {}, "/v1/completions answered 500"),
        (("--served-model-name", "else"), {}, "serves else from"),
    ],
)
async def test_wrong_artefact_never_gets_ready(
    tmp_path: Path, args: tuple[str, ...], settings: dict[str, Any], cause: str
) -> None:
    """What doesn't prove to be the declared variant is ended, and the state says what it was."""
    planned = launch(tmp_path, "int4", *args, **settings)
    assert planned.variant.path
    (planned.variant.path / EVALUATION_FILE).write_text(json.dumps({"golden": GOLDEN}))
    golden = GoldenAnswer((65, 66, 67, 68), (-1.5, -2.5, -0.5), (-1.0, -2.0, -0.25))
    planned = dataclasses.replace(planned, variant=dataclasses.replace(planned.variant, golden=golden))
    async with supervised(tmp_path, planned, backoff=SLOW) as registry:
        status = await until(registry, lambda status: status.state is State.FAILED)
        assert cause in status.reason
        await eventually(lambda: noted_sessions(tmp_path) == set())


async def test_right_artefact_gets_ready(tmp_path: Path) -> None:
    """With the record that it was made with, and what another engine differs by, it proves itself."""
    planned = launch(tmp_path, "int4", "--fake-logprob-shift", "0.07")
    assert planned.variant.path
    (planned.variant.path / EVALUATION_FILE).write_text(json.dumps({"golden": GOLDEN}))
    golden = GoldenAnswer((65, 66, 67, 68), (-1.5, -2.5, -0.5), (-1.0, -2.0, -0.25))
    planned = dataclasses.replace(planned, variant=dataclasses.replace(planned.variant, golden=golden))
    async with supervised(tmp_path, planned, backoff=SLOW) as registry:
        await ready(registry)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"can't mount a small disk here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


async def test_full_disk_under_the_logs(tmp_path: Path, small_disk: Path) -> None:
    """Logs that can't grow stop nobody: the replica stays ready and answers."""
    planned = launch(tmp_path, "int4")
    async with supervising(tmp_path, planned, log_folder=small_disk) as supervisor:
        replica = (await ready(supervisor.registry)).replica
        _fill(small_disk / "filler")
        async with asking(replica) as task:
            assert (await task).status_code == 200
        assert supervisor.registry.status("int4-1").state is State.READY


async def test_no_room_for_the_note_starts_nothing(tmp_path: Path, small_disk: Path) -> None:
    """A replica that could not be found again is not started; the state says what is full."""
    _fill(small_disk / "filler")
    async with supervising(small_disk, launch(tmp_path, "int4"), log_folder=tmp_path, backoff=SLOW) as supervisor:
        status = await until(supervisor.registry, lambda status: status.state is State.FAILED)
    assert "No space left on device" in status.reason


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)


@contextmanager
def _taken(port: int) -> Iterator[None]:
    """Be the first to bind a port whose owner is dying; nobody else of this loop runs meanwhile."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def bound() -> bool:
            with suppress(OSError):
                other.bind(("127.0.0.1", port))
                other.listen()
                return True
            return False

        wait_until(bound)
        yield


def _told(caplog: pytest.LogCaptureFixture, what: str) -> bool:
    return any(message.endswith(what) for message in caplog.messages)
