"""Fake replicas for tests: started, awaited until healthy, read, and taken down with all of their processes."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from inspect import isawaitable
from pathlib import Path
from typing import Any, TypeVar, overload

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
POLL_SECONDS = 0.01
DEADLINE_SECONDS = 20.0
TOOL_FLAGS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
# Of `eventually`: a failing test may take long, a slow machine must not fail one.
PATIENCE_SECONDS = 50.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FakeReplica:
    """A fake that runs: its address, its process, and what it noted."""

    port: int
    process: Process
    folder: Path

    @property
    def url(self) -> str:
        """What a client's base URL is."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """The process, and the process group, of the fake."""
        return self.process.pid

    def requests(self, path: str | None = None) -> list[dict[str, Any]]:
        """Every request so far, or those to one path, oldest first; the one that asked for health is among them."""
        return [line for line in self._lines() if "event" not in line and path in (None, line["path"])]

    def endings(self) -> list[dict[str, Any]]:
        """How generations ended so far: `{"event": "finished" | "aborted", "tokens": n}`."""
        return [line for line in self._lines() if "event" in line]

    async def ended(self, count: int = 1) -> list[dict[str, Any]]:
        """The endings, as soon as there are `count` of them."""
        return await eventually(lambda: found if len(found := self.endings()) >= count else None)

    async def requested(self, path: str, count: int = 1) -> list[dict[str, Any]]:
        """The requests to a path, as soon as there are `count` of them."""
        return await eventually(lambda: found if len(found := self.requests(path)) >= count else None)

    def resume(self) -> None:
        """Let stalled generations go on; nothing stalls any more."""
        self.process.send_signal(signal.SIGUSR1)

    async def change_metrics(self, *, rename: Mapping[str, str] | None = None, stall: bool = False) -> None:
        """Give metrics other names, or none an answer, from now on; without arguments all is well again."""
        body = json.dumps({"rename": dict(rename or {}), "stall": stall})
        assert await _answers(self.port, "POST /fake/metrics", body), "a fake takes every change"

    async def exited(self) -> int:
        """The exit code, when the process is gone."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await self.process.wait()

    def output(self) -> str:
        """What the fake wrote to stderr so far."""
        return (self.folder / "stderr").read_text(encoding="utf-8")

    def members(self) -> list[int]:
        """The processes of the fake's group that live, itself included."""
        return group_members(self.pid)

    def _lines(self) -> list[dict[str, Any]]:
        noted = self.folder / "requests"
        if not noted.exists():
            return []
        # A line that is still being written has no end yet.
        whole, _, _ = noted.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]


def fake_argv(*flags: str, served: str = "m1", port: int = 0) -> list[str]:
    """The command line of a fake, to be run in `ROOT`."""
    names = served.split()
    named = ["--model", f"/models/{names[0]}", "--served-model-name", *names]
    return [sys.executable, "-m", "tests.fakes.vllm", *named, "--host", HOST, "--port", str(port), *flags]


@contextlib.asynccontextmanager
async def running_fake(
    *flags: str, served: str = "m1", env: Mapping[str, str] | None = None, wait: bool = True, tools: bool = True
) -> AsyncIterator[FakeReplica]:
    """A fake in a session of its own, healthy on entry unless `wait` is false, gone with its children on exit.

    `served` holds one name or several, separated by blanks. `tools`: started with a parser for calls of tools.
    """
    with tempfile.TemporaryDirectory(prefix="fake-vllm-") as name:
        folder = Path(name)
        parser = TOOL_FLAGS if tools else ()
        kept = [*parser, "--fake-port-file", str(folder / "port"), "--fake-log-requests", str(folder / "requests")]
        process = await start_process(fake_argv(*kept, *flags, served=served), folder / "stderr", env or {})
        try:
            replica = FakeReplica(await announced_port(process, folder), process, folder)
            if wait:
                await _until_healthy(replica)
            yield replica
        finally:
            kill_group(process.pid)
            await process.wait()


@contextlib.asynccontextmanager
async def running_provider() -> AsyncIterator[FakeReplica]:
    """A fake of other providers, which listens on entry; see `tests.fakes.provider`."""
    with tempfile.TemporaryDirectory(prefix="fake-provider-") as name:
        folder = Path(name)
        files = ["--port-file", str(folder / "port"), "--log", str(folder / "requests")]
        process = await start_process([sys.executable, "-m", "tests.fakes.provider", *files], folder / "stderr", {})
        try:
            yield FakeReplica(await announced_port(process, folder), process, folder)
        finally:
            kill_group(process.pid)
            await process.wait()


@overload
async def eventually(look: Callable[[], Awaitable[T | None]], deadline_seconds: float = ...) -> T: ...
@overload
async def eventually(look: Callable[[], T | None], deadline_seconds: float = ...) -> T: ...
async def eventually(look: Callable[[], Any], deadline_seconds: float = PATIENCE_SECONDS) -> Any:
    """Poll until `look`, a function or a coroutine function, returns something true; TimeoutError at the deadline."""
    async with asyncio.timeout(deadline_seconds):
        while True:
            found = look()
            if found := await found if isawaitable(found) else found:
                return found
            await asyncio.sleep(POLL_SECONDS)


def wait_until(
    look: Callable[[], T | None], deadline_seconds: float = PATIENCE_SECONDS, poll_seconds: float = POLL_SECONDS
) -> T:
    """Poll as `eventually` does, for tests without an event loop; TimeoutError at the deadline."""
    deadline = time.monotonic() + deadline_seconds
    while not (found := look()):
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(poll_seconds)
    return found


def kill_group(leader: int) -> None:
    """SIGKILL to every process of a group, if any is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def group_members(leader: int) -> list[int]:
    """The processes of a group, without those that only wait to be reaped."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone while we looked
            # "pid (name with any characters) state parent group ...", see proc_pid_stat(5)
            state, _, group = stat.read_text().rpartition(") ")[2].split()[:3]
            if int(group) == leader and state != "Z":
                members.append(int(stat.parent.name))
    return members


async def start_process(argv: list[str], stderr: Path, env: Mapping[str, str]) -> Process:
    """Start a fake in a session of its own."""
    with stderr.open("wb") as written:
        return await asyncio.create_subprocess_exec(
            *argv, cwd=ROOT, env={**os.environ, **env}, stderr=written, start_new_session=True
        )


async def announced_port(process: Process, folder: Path) -> int:
    """Read the port of a fake from the file `port` in its folder, as soon as it is there."""
    announced = folder / "port"

    def look() -> int | None:
        _check_alive(process, folder)
        return int(announced.read_text()) if announced.exists() else None

    return await eventually(look)


async def _until_healthy(replica: FakeReplica) -> None:
    async def healthy() -> bool:
        _check_alive(replica.process, replica.folder)
        return await _answers(replica.port, "GET /health")

    await eventually(healthy)


async def _answers(port: int, asked: str, body: str = "") -> bool:
    """Whether a request is answered with 200 on a connection of its own."""
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
    except ConnectionRefusedError:
        return False
    described = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
    try:
        writer.write(f"{asked} HTTP/1.1\r\nhost: fake\r\n{described}\r\n{body}".encode())
        return (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    finally:
        writer.close()
        await writer.wait_closed()


def _check_alive(process: Process, folder: Path) -> None:
    if process.returncode is not None:
        said = (folder / "stderr").read_text(encoding="utf-8")
        raise AssertionError(f"the fake exited with {process.returncode} before it was ready:\n{said}")
