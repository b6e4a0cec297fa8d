"""A gateway that is replaced under load loses no request: by takeover, and by a restart with sockets that are kept."""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway.http.sockets import address_of
from tests.fakes.running import DEADLINE_SECONDS, HOST, PATIENCE_SECONDS, ROOT, FakeReplica, eventually, running_fake
from tests.fakes.service_manager import service_manager, stopped
from tests.gateway.fleet import CHAT, HELLO
from tests.gateway.test_workers import free_ports
from tests.gateway.upgrade_load import Outcomes, upgrade_load
from tests.gateway.wire import connected, posted

pytestmark = pytest.mark.asyncio(loop_scope="session")

WORKERS = [pytest.param(1, id="one process"), pytest.param(2, id="workers")]


@dataclass(slots=True)
class Service:
    """A gateway that is replaced: its configuration, and every process so far."""

    folder: Path
    client: int
    admin: int
    workers: int = 1
    processes: list[Process] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where clients reach it."""
        return f"{HOST}:{self.client}"

    @property
    def arguments(self) -> list[str]:
        """What follows `python`."""
        many = ["--workers", str(self.workers), "--force"] if self.workers > 1 else []
        return ["-m", "quantgate", "gateway", str(self.config), *many]

    @property
    def environment(self) -> dict[str, str]:
        """A home of its own."""
        return {"QUANTGATE_HOME": str(self.folder / "home")}

    @property
    def config(self) -> Path:
        """Its configuration file."""
        return self.folder / "quantgate.yaml"

    @property
    def stderr(self) -> Path:
        """What all processes have written."""
        return self.folder / "stderr"

    def configure(self, *urls: str, **changes: Any) -> None:
        """Write a configuration with replicas at these addresses."""
        settings = {
            "gateway": {
                "listen": f"{HOST}:{self.client}",
                "admin": f"{HOST}:{self.admin}",
                "access_log": "off",
                "drain_seconds": 30,
                **changes,
            },
            "variants": {"hi": {"precision": "bf16"}},
            "replicas": [{"variant": "hi", "url": url} for url in urls],
            "aliases": {"smol": {"ladder": ["hi"]}},
        }
        self.config.write_text(yaml.safe_dump(settings))

    async def start(self, *more: str) -> Process:
        """Start a gateway."""
        with self.stderr.open("ab") as written:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, *self.arguments, *more),
                cwd=ROOT,
                env={**os.environ, **self.environment},
                stderr=written,
            )
        self.processes.append(process)
        return process

    async def ready(self) -> None:
        """Wait until requests are answered."""
        async with httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as client:

            async def answers() -> bool:
                try:
                    response = await client.post(f"http://{self.address}{CHAT}", json=HELLO)
                except httpx.TransportError:
                    return False
                return response.status_code == 200

            await eventually(answers, PATIENCE_SECONDS)  # three processes start

    async def workers_ready(self) -> bool:
        """Whether each worker has a replica."""
        async with httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as client:
            try:
                ports = range(self.admin, self.admin + self.workers)
                answers = [await client.get(f"http://{HOST}:{port}/readyz") for port in ports]
            except httpx.TransportError:
                return False
            return all(answer.status_code == 200 for answer in answers)

    def said(self, text: str) -> int:
        """How often a text is in the output."""
        return self.stderr.read_text().count(text)


@asynccontextmanager
async def service(folder: Path, workers: int = 1) -> AsyncIterator[Service]:
    """A gateway's folder and ports; its processes are ended on exit."""
    client, admin, _ = free_ports(3)
    made = Service(folder, client, admin, workers)
    try:
        yield made
    finally:
        for process in made.processes:
            if process.returncode is None:
                process.terminate()
        async with asyncio.timeout(2 * PATIENCE_SECONDS):
            for process in made.processes:
                await process.wait()


async def taken_over(running: Service) -> None:
    """Replace the gateway; returns when the one before has ended."""
    before = running.processes[-1]
    await running.start("--takeover")
    async with asyncio.timeout(3 * PATIENCE_SECONDS):
        assert await before.wait() == 0, running.stderr.read_text()


def check(outcomes: Outcomes) -> None:
    """Nothing is lost, and each kind of client had answers."""
    assert outcomes.lost == {}
    assert all(outcomes.total(kind) for kind in ("raw", "sdk", "stream")), outcomes.counts


@pytest.mark.parametrize("workers", WORKERS)
async def test_takeovers_lose_nothing(tmp_path: Path, fake: FakeReplica, workers: int) -> None:
    """Connections, streams and requests on idle connections survive; each predecessor exits with code 0."""
    async with service(tmp_path, workers) as running:
        running.configure(fake.url)
        await running.start()
        await running.ready()
        async with upgrade_load(running.address, raw=4, sdk=4, streams=4, pause_seconds=0.1) as outcomes:
            for _ in range(2):
                await taken_over(running)
        check(outcomes)


@pytest.mark.parametrize("workers", WORKERS)
async def test_restarts_with_kept_sockets_lose_nothing(tmp_path: Path, fake: FakeReplica, workers: int) -> None:
    """While no process runs, connections wait in the sockets that the service manager keeps open."""
    async with service_manager(tmp_path, "client", "admin") as manager:
        client, admin = (each.getsockname()[1] for each in manager.sockets.values())
        running = Service(tmp_path, client, admin, workers)
        running.configure(fake.url)
        process = await manager.start(running.arguments, running.environment)
        await running.ready()
        async with upgrade_load(running.address, raw=4, sdk=4, streams=4, pause_seconds=0.1) as outcomes:
            for _ in range(2):
                assert await stopped(process) == 0
                process = await manager.start(running.arguments, running.environment)
        check(outcomes)
        assert await stopped(process) == 0
        assert manager.messages().count("STOPPING=1") == 3


async def test_a_service_is_not_taken_over(tmp_path: Path, fake: FakeReplica) -> None:
    """Its service manager would start another one: the successor says how to restart it, and the gateway goes on."""
    async with service_manager(tmp_path, "client", "admin") as manager, service(tmp_path) as running:
        running.client, running.admin = (each.getsockname()[1] for each in manager.sockets.values())
        running.configure(fake.url)
        process = await manager.start(running.arguments, running.environment)
        successor = await running.start("--takeover")
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await successor.wait() == 2
        assert running.said("a service manager runs it, and would start another one: use systemctl restart") == 1
        await running.ready()
        assert await stopped(process) == 0


async def test_a_successor_that_fails(tmp_path: Path, fake: FakeReplica) -> None:
    """If it is killed before it is ready, or its configuration is invalid, the gateway goes on."""
    # The kernel connects, and nobody answers: the successor does not know of this replica for a while.
    with socket.create_server((HOST, 0)) as silent:
        async with service(tmp_path) as running:
            running.configure(fake.url, f"http://{address_of(silent)}")
            first = await running.start()
            await running.ready()
            async with upgrade_load(running.address, raw=2, sdk=2, streams=2, pause_seconds=0.1) as outcomes:
                killed = await running.start("--takeover")
                await eventually((tmp_path / "home" / "control" / f"{killed.pid}.sock").exists)
                killed.kill()
                await eventually(lambda: running.said("the process that was to take over has ended") > 0)
                running.config.write_text("gateway: {listen: nowhere}")
                invalid = await running.start("--takeover")
                async with asyncio.timeout(PATIENCE_SECONDS):
                    assert await invalid.wait() == 2
                assert first.returncode is None
            check(outcomes)


@pytest.mark.parametrize("workers", WORKERS)
async def test_a_successor_that_is_stopped_while_it_starts(tmp_path: Path, fake: FakeReplica, workers: int) -> None:
    """It ends at once, and does not take over; the gateway goes on."""
    with socket.create_server((HOST, 0)) as silent:
        async with service(tmp_path, workers) as running:
            running.configure(fake.url, f"http://{address_of(silent)}")
            first = await running.start()
            await running.ready()
            second = await running.start("--takeover")
            await eventually((tmp_path / "home" / "control" / f"{second.pid}.sock").exists)
            assert await stopped(second) == 0
            assert running.said("took over from process") == 0
            await eventually(lambda: running.said("the process that was to take over has ended") > 0)
            assert first.returncode is None
            await running.ready()


@pytest.mark.parametrize("workers", WORKERS)
async def test_a_predecessor_that_is_stopped_first(tmp_path: Path, fake: FakeReplica, workers: int) -> None:
    """While its successor starts, connections wait for that one: nothing is refused or lost."""
    silent = socket.create_server((HOST, 0))
    async with service(tmp_path, workers) as running:
        running.configure(fake.url, f"http://{address_of(silent)}")
        first = await running.start()
        await running.ready()
        async with (
            connected(f"http://{running.address}") as slow,
            upgrade_load(running.address, raw=2, sdk=2, streams=2, pause_seconds=0.1) as outcomes,
        ):
            second = await running.start("--takeover")
            await eventually((tmp_path / "home" / "control" / f"{second.pid}.sock").exists)
            request = posted(HELLO)
            await slow.say(request[:-1])  # the first one ends after its answer
            first.terminate()
            await eventually(lambda: running.said("SIGTERM: stopping") > 0)
            silent.close()
            await eventually(lambda: running.said("took over from process") > 0)
            await slow.say(request[-1:])
            assert b"HTTP/1.1 200 OK" in await slow.read_all()
            assert await first.wait() == 0
        check(outcomes)
        assert running.said("Traceback") == 0


def listening_sockets(pid: int) -> dict[str, bool]:
    """The listening TCP sockets of a process, by inode, and whether its children inherit them."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A"}
    found = dict[str, bool]()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if (target := str(link.readlink())) in listening:
            _, _, flags = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text().partition("flags:")
            found[target] = not (int(flags.split()[0], 8) & os.O_CLOEXEC)
    return found


@pytest.mark.parametrize("workers", WORKERS)
async def test_who_has_the_sockets_after_a_takeover(tmp_path: Path, fake: FakeReplica, workers: int) -> None:
    """The successor, and each of its workers its own; no other child inherits them."""
    async with service(tmp_path, workers) as running:
        running.configure(fake.url)
        await running.start()
        await running.ready()
        await taken_over(running)
        await running.ready()
        pid = running.processes[-1].pid
        children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        of_processes = [listening_sockets(each) for each in (pid, *children)]
        assert [len(sockets) for sockets in of_processes] == ([2] if workers == 1 else [3, 2, 2])
        assert not any(any(sockets.values()) for sockets in of_processes)


async def test_a_reload_while_workers_drain(tmp_path: Path) -> None:
    """SIGHUP does not end the parent: the running request is answered."""
    async with running_fake("--fake-stall-after-tokens", "2", served="hi") as stalled, service(tmp_path, 2) as running:
        running.configure(stalled.url)
        parent = await running.start()
        await eventually(running.workers_ready)
        async with connected(f"http://{running.address}") as slow:
            await slow.say(posted({**HELLO, "stream": True}))
            await slow.read_until(b"data: ")
            parent.terminate()
            await eventually(lambda: running.said("SIGTERM: stopping") == 3)  # the parent and its workers
            parent.send_signal(signal.SIGHUP)
            await eventually(lambda: running.said("SIGHUP: stopping, nothing to reload") > 0)
            stalled.resume()
            await slow.read_until(b"[DONE]")
        assert await parent.wait() == 0
