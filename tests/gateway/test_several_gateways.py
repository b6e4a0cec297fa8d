"""Two gateways on one PostgreSQL under load, with each part killed in turn: keys, limits and usage are shared."""

import asyncio
import contextlib
import re
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway.keys import KeyLimits
from gateway.keys.database import KeyDatabase
from gateway.keys.issuing import create_key, revoke_key
from gateway.observability.usage import FLUSH_SECONDS
from serving.state.database import StateDatabase
from serving.state.usage import UsageDatabase
from tests.fakes.running import DEADLINE_SECONDS, HOST, ROOT, FakeReplica, eventually, running_fake
from tests.gateway.fleet import CHAT, HELLO
from tests.gateway.test_workers import free_ports
from tests.serving.state.conftest import postgresql
from tests.serving.state.databases import PostgreSQL

__all__ = ["postgresql"]

pytestmark = pytest.mark.asyncio(loop_scope="session")

PER_MINUTE = 60
# Between requests of one client; each gateway has one for each key.
PAUSE_SECONDS = {"free": 0.1, "limited": 0.3}
# By the clock of the clients: an answer arrives later than its request was admitted.
CLOCK_SECONDS = 2.0


@dataclass
class Gateway:
    """A gateway that can be killed and started again; `config` is its own, the state is not."""

    config: Path
    client: str
    admin: str
    http: httpx.AsyncClient
    process: Process | None = None
    is_up: bool = False

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        command = ("-m", "quantgate", "gateway", str(self.config))
        self.process = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=ROOT, stderr=DEVNULL)
        await eventually(self._is_ready)
        self.is_up = True

    async def end(self, number: signal.Signals) -> None:
        """Send a signal and wait until it is gone."""
        self.is_up = False
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self.process.wait()

    async def ask(self, key: str) -> int:
        """Send a request with a key; the status."""
        answer = await self.http.post(f"{self.client}{CHAT}", json=HELLO, headers={"authorization": f"Bearer {key}"})
        return answer.status_code

    async def is_local(self) -> bool:
        """Whether it admits a fixed share of limits."""
        text = (await self.http.get(f"{self.admin}/metrics")).text
        found = re.search(r"^quantgate_quota_local (\S+)$", text, re.MULTILINE)
        assert found is not None
        return float(found[1]) == 1

    async def _is_ready(self) -> bool:
        try:
            return (await self.http.get(f"{self.admin}/readyz")).status_code == 200
        except httpx.TransportError:
            return False


@dataclass
class Traffic:
    """Clients of both gateways: `answers` has (time, key, gateway) of all 200s."""

    keys: dict[str, str]
    answers: list[tuple[float, str, Gateway]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    async def send(self, gateway: Gateway, name: str) -> None:
        """Send requests for ever; one that is not answered is a failure, unless its key is limited."""
        while True:
            was_up = gateway.is_up
            try:
                status: int | str = await gateway.ask(self.keys[name])
            except httpx.TransportError as error:
                status = repr(error)
            if status == 200:
                self.answers.append((time.monotonic(), name, gateway))
            elif was_up and gateway.is_up and not (status == 429 and name == "limited"):
                self.failures.append(f"{name}: {status}")
            await asyncio.sleep(PAUSE_SECONDS[name])

    async def goes_on(self, gateway: Gateway, count: int = 10) -> None:
        """Wait for some more answers of a gateway."""
        before = self.count(gateway, "free")
        await eventually(lambda: self.count(gateway, "free") >= before + count)

    def count(self, gateway: Gateway, name: str, since: float = 0.0) -> int:
        """The answers of a gateway."""
        return sum(each is gateway and key == name and at >= since for at, key, each in self.answers)

    def excess(self) -> float:
        """The most that was admitted of the limited key, over any time, above one bucket and its refill."""
        most, full = 0.0, 0.0
        for at, name, _ in self.answers:
            if name == "limited":
                full = max(full, at) + 60 / PER_MINUTE
                most = max(most, (full - at) * PER_MINUTE / 60 - PER_MINUTE)
        return most


@asynccontextmanager
async def sent(traffic: Traffic, gateways: list[Gateway]) -> AsyncIterator[None]:
    """Send requests with each key to each gateway while the block runs."""
    tasks = [asyncio.create_task(traffic.send(gateway, name)) for gateway in gateways for name in PAUSE_SECONDS]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results), results


@asynccontextmanager
async def two_gateways(folder: Path, state: str, replicas: list[FakeReplica]) -> AsyncIterator[list[Gateway]]:
    """Two gateways that share a state database and replicas."""
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False))
        gateways = []
        for number in range(2):
            client, admin = free_ports(2)
            settings: dict[str, Any] = {
                "gateway": {"listen": f"{HOST}:{client}", "admin": f"{HOST}:{admin}", "state": state},
                "variants": {"hi": {"precision": "bf16"}},
                "replicas": [{"variant": "hi", "url": replica.url} for replica in replicas],
                "aliases": {"smol": {"ladder": ["hi"]}},
            }
            settings["gateway"]["keys"] = "database"
            config = folder / f"gateway-{number}.yaml"
            config.write_text(yaml.safe_dump(settings))
            gateways.append(Gateway(config, f"http://{HOST}:{client}", f"http://{HOST}:{admin}", http))
        await asyncio.gather(*(gateway.start() for gateway in gateways))
        for gateway in gateways:
            stack.push_async_callback(gateway.end, signal.SIGTERM)
        yield gateways


@dataclass(frozen=True)
class State:
    """The shared database as the command line changes it."""

    url: str

    @contextlib.contextmanager
    def keys(self) -> Iterator[KeyDatabase]:
        """The keys in it."""
        database = StateDatabase.at(self.url)
        try:
            yield KeyDatabase(database)
        finally:
            database.close()

    def create(self, name: str, limits: KeyLimits | None = None) -> str:
        """Create a key."""
        with self.keys() as keys:
            return create_key(keys, name, limits or KeyLimits())

    def revoke(self, name: str) -> None:
        """Revoke one."""
        with self.keys() as keys:
            revoke_key(keys, name)

    def requests(self, name: str) -> int:
        """The requests of a key in the usage, without refused ones."""
        database = StateDatabase.at(self.url)
        groups = UsageDatabase(database).grouped(("key",), 0, 2**31 - 1)
        database.close()
        return next(group.usage.requests - group.usage.errors for group in groups if group.key == name)


async def refused(gateways: list[Gateway], key: str, status: int = 401) -> None:
    """Wait until both answer a key with a status."""
    for gateway in gateways:

        async def is_answered(gateway: Gateway = gateway) -> bool:
            return await gateway.ask(key) == status

        await eventually(is_answered)


async def test_each_part_is_killed_in_turn(postgresql: PostgreSQL, tmp_path: Path) -> None:
    """No request fails elsewhere, the limit holds, keys are followed, and only killed gateways lose usage."""
    state = State(postgresql.new_database())
    limited = state.create("limited", KeyLimits(requests_per_minute=PER_MINUTE))
    traffic = Traffic({"free": state.create("free"), "limited": limited})
    revoked = state.create("revoked")
    async with (
        running_fake() as one,
        running_fake() as other,
        two_gateways(tmp_path, state.url, [one, other]) as gateways,
    ):
        await refused(gateways, revoked, 200)
        state.revoke("revoked")
        await refused(gateways, revoked)
        lost = 0
        async with sent(traffic, gateways):
            for victim, survivor in (gateways, reversed(gateways)):
                await traffic.goes_on(victim)
                since = time.monotonic() - FLUSH_SECONDS - CLOCK_SECONDS
                await victim.end(signal.SIGKILL)
                lost += traffic.count(victim, "free", since)
                await traffic.goes_on(survivor)
                await victim.start()
                await traffic.goes_on(victim)
            assert traffic.excess() <= PER_MINUTE / 60 * (1 + CLOCK_SECONDS)
            postgresql.stop()
            try:
                await eventually(lambda: _all_local(gateways, expected=True))
                for gateway in gateways:
                    await traffic.goes_on(gateway)
                    assert await gateway.ask(revoked) == 401
            finally:
                postgresql.start()
            late = state.create("late")
            await refused(gateways, late, 200)
            await eventually(lambda: _all_local(gateways, expected=False))
        assert traffic.failures == []
        # Away from the database, each has admitted its fixed share for itself.
        assert traffic.excess() <= PER_MINUTE
        answered = sum(traffic.count(gateway, "free") for gateway in gateways)
        await asyncio.gather(*(gateway.end(signal.SIGTERM) for gateway in gateways))
    # A request that was cancelled at the end of the traffic may be counted, too.
    assert answered - lost <= state.requests("free") <= answered + len(gateways)


async def _all_local(gateways: list[Gateway], *, expected: bool) -> bool:
    return [await gateway.is_local() for gateway in gateways] == [expected] * len(gateways)
