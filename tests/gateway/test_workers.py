"""Several gateway processes on one port."""

import asyncio
import os
import random
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from config.errors import ConfigError
from config.schema import GatewaySettings
from gateway.workers import BOOT, WorkerIndex, check_ports
from quantgate import main
from tests.fakes.running import DEADLINE_SECONDS, HOST, PATIENCE_SECONDS, POLL_SECONDS, ROOT, FakeReplica, eventually
from tests.gateway.fleet import CHAT, HELLO

session_loop = pytest.mark.asyncio(loop_scope="session")


def free_ports(count: int) -> list[int]:
    """Ports in a row that nobody listens on now, below those that outgoing connections take."""
    while True:
        begin = random.randrange(16_000, 32_000)
        with ExitStack() as taken, suppress(OSError):
            for number in range(count):
                taken.enter_context(socket.create_server((HOST, begin + number)))
            return [begin + number for number in range(count)]


@dataclass(frozen=True)
class Crew:
    """A parent with two workers."""

    process: Process
    client: str
    admins: tuple[str, str]

    async def pids(self) -> list[int]:
        """The workers' processes."""
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    async def answers(self, count: int) -> list[bool]:
        """Whether each of so many workers is alive and ready."""
        async with httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as client:
            ready = []
            for admin in self.admins[:count]:
                try:
                    ready.append((await client.get(f"{admin}/readyz")).status_code == 200)
                except httpx.TransportError:
                    ready.append(False)
            return ready

    async def ready(self) -> None:
        """Wait until both are."""
        async with asyncio.timeout(2 * PATIENCE_SECONDS):
            while await self.answers(2) != [True, True]:  # noqa: ASYNC110 - other processes' progress
                await asyncio.sleep(POLL_SECONDS)


@asynccontextmanager
async def crew(folder: Path, fake: FakeReplica, drain_seconds: float = 5) -> AsyncIterator[Crew]:
    """Two workers in front of a replica."""
    client, first, second = free_ports(3)
    settings = {
        "gateway": {"listen": f"{HOST}:{client}", "admin": f"{HOST}:{first}", "drain_seconds": drain_seconds},
        "variants": {"hi": {"precision": "bf16"}},
        "replicas": [{"variant": "hi", "url": fake.url}],
        "aliases": {"smol": {"ladder": ["hi"]}},
    }
    config = folder / "quantgate.yaml"
    config.write_text(yaml.safe_dump(settings))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "quantgate", "gateway", str(config), "--workers", "2", "--force"),
        cwd=ROOT,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield Crew(process, f"http://{HOST}:{client}", (f"http://{HOST}:{first}", f"http://{HOST}:{second}"))
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(2 * DEADLINE_SECONDS):
            await process.wait()


async def gone(pids: list[int]) -> None:
    """Wait until none of these processes is there."""
    async with asyncio.timeout(2 * DEADLINE_SECONDS):
        while any(Path(f"/proc/{pid}").exists() and _lives(pid) for pid in pids):  # noqa: ASYNC110 - other processes' progress
            await asyncio.sleep(POLL_SECONDS)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@session_loop
async def test_two_workers(tmp_path: Path, fake: FakeReplica) -> None:
    """Both answer on the one port, one that dies is started again, and all end in order when the parent is told to."""
    async with crew(tmp_path, fake) as running:
        await running.ready()
        before = await running.pids()
        assert len(before) == 2
        for _ in range(30):  # connections of their own, which the kernel spreads
            async with httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as client:
                assert (await client.post(f"{running.client}{CHAT}", json=HELLO)).status_code == 200
        async with httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as client:
            pages = [(await client.get(f"{admin}/metrics")).text for admin in running.admins]
        assert all('quantgate_requests_total{alias="smol"' in page for page in pages)
        os.kill(before[0], signal.SIGKILL)
        async with asyncio.timeout(2 * DEADLINE_SECONDS):
            while before[0] in await running.pids():  # noqa: ASYNC110 - other processes' progress
                await asyncio.sleep(POLL_SECONDS)
        await running.ready()
        after = await running.pids()
    assert running.process.returncode == 0
    await gone([*before, *after])


@session_loop
async def test_workers_do_not_outlive_their_parent(tmp_path: Path, fake: FakeReplica) -> None:
    """However the parent ends."""
    async with crew(tmp_path, fake) as running:
        await running.ready()
        pids = await running.pids()
        running.process.kill()
        await running.process.wait()
        await gone(pids)


@session_loop
async def test_a_worker_that_does_not_end(tmp_path: Path, fake: FakeReplica) -> None:
    """One that hangs keeps nobody from stopping: it is killed."""
    async with crew(tmp_path, fake, drain_seconds=0) as running:
        await running.ready()
        pids = await running.pids()
        os.kill(pids[0], signal.SIGSTOP)
    assert running.process.returncode == 0
    await gone(pids)


# The parent of a worker whose imports never end: a module of the folder stands in for the command line.
NEVER_STARTED = "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(600)\n"
PARENT = """
import asyncio, os, socket
from pathlib import Path
from gateway.workers import Worker, WorkerIndex, WorkerSockets
taken = socket.create_server(("127.0.0.1", 0))
sockets = WorkerSockets(taken, (taken,), "none")
asyncio.run(Worker(Path("none.yaml"), WorkerIndex(), sockets, *os.pipe()).run())
"""


async def test_workers_that_still_start_die_with_their_parent(tmp_path: Path) -> None:
    """A worker that has not got as far as its event loop survives a reload, and ends with its parent."""
    (tmp_path / "quantgate.py").write_text(NEVER_STARTED)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT), cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    pid = int(await eventually(lambda: (path := tmp_path / "pid").exists() and path.read_text()))
    _, _, ignored = Path(f"/proc/{pid}/status").read_text().partition("SigIgn:")
    assert int(ignored.split()[0], 16) & 1 << signal.SIGHUP - 1
    process.kill()
    await process.wait()
    await gone([pid])


async def test_a_worker_whose_parent_died_at_once() -> None:
    """A worker that finds another parent than it was told does not start."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", BOOT, "1", "gateway", "none.yaml"), cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    _, err = await process.communicate()
    assert (process.returncode, err) == (1, b"the parent of this gateway worker has exited\n")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--workers", "0"], "'0' is not a number of workers; the least is 1"),
        (["--workers", "-2"], "'-2' is not a number of workers"),
        (["--workers", "1.5"], "'1.5' is not a number of workers"),
        (["--workers", "100000"], "cores that this process may use; see --force"),
    ],
)
def test_numbers_of_workers(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    """No worker, and more than cores without --force, are usage errors."""
    with pytest.raises(SystemExit) as ended:
        main(["gateway", *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "listen, admin, words",
    [
        ("127.0.0.1:8000", "127.0.0.1:65530", "worker 10 would have the admin port 65539, above 65535"),
        ("127.0.0.1:8005", "127.0.0.1:8001", "8001 to 8010, include the port of gateway.listen"),
        ("127.0.0.1:0", "127.0.0.1:8001", "--workers needs fixed ports"),
    ],
)
def test_ports_of_workers(listen: str, admin: str, words: str) -> None:
    """Ports that the workers could not all have are refused before one is started."""
    with pytest.raises(ConfigError, match=words):
        check_ports(GatewaySettings(listen=listen, admin=admin), 10)


@pytest.mark.parametrize("text", ["1/1", "2/4"])
def test_places(text: str) -> None:
    """A place is written as it is read, and has its share."""
    place = WorkerIndex.parse(text)
    assert (str(place), place.share) == (text, 1 / place.of)


@pytest.mark.parametrize("text", ["", "0/1", "3/2", "a/b", "1"])
def test_no_places(text: str) -> None:
    """What isn't a place is refused."""
    with pytest.raises(ValueError, match=r"invalid literal|is not a worker index"):
        WorkerIndex.parse(text)
