"""Fake replicas for tests: started, awaited until healthy, read, and taken down with all of their processes."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
POLL_SECONDS = 0.01
DEADLINE_SECONDS = 10.0

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

    async def exited(self) -> int:
        """The exit code, when the process is gone."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await self.process.wait()

    def output(self) -> str:
        """What the fake wrote to stderr so far."""
        return (self.folder / "stderr").read_text(encoding="utf-8")

    def _lines(self) -> list[dict[str, Any]]:
        noted = self.folder / "requests"
        if not noted.exists():
            return []
        # A line that is still being written has no end yet.
        whole, _, _ = noted.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]


def fake_argv(*flags: str, served: str = "m1", port: int = 0) -> list[str]:
    """The command line of a fake, to be run in `ROOT`."""
    named = ["--model", f"/models/{served.split()[0]}", "--served-model-name", *served.split()]
    return [sys.executable, "-m", "tests.fakes.vllm", *named, "--host", HOST, "--port", str(port), *flags]


@contextlib.asynccontextmanager
async def running_fake(
    *flags: str, served: str = "m1", env: Mapping[str, str] | None = None, wait: bool = True
) -> AsyncIterator[FakeReplica]:
    """A fake in a session of its own, healthy on entry unless told not to wait, gone with its children on exit.

    `served` holds one name or several, separated by blanks.
    """
    with tempfile.TemporaryDirectory(prefix="fake-vllm-") as name:
        folder = Path(name)
        kept = ["--fake-port-file", str(folder / "port"), "--fake-log-requests", str(folder / "requests")]
        process = await _start(fake_argv(*kept, *flags, served=served), folder / "stderr", env or {})
        try:
            replica = FakeReplica(await _port(process, folder), process, folder)
            if wait:
                await eventually(lambda: _alive(process, folder), _healthy(replica.port))
            yield replica
        finally:
            kill_group(process.pid)
            await process.wait()


async def eventually(look: Callable[[], T | None]) -> T:
    """Look again and again until there is something, at most `DEADLINE_SECONDS`."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (found := look()) is None:
            await asyncio.sleep(POLL_SECONDS)
        return found
