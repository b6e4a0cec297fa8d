"""Usage through whole gateways: the admin port, the command line, several workers, killed processes."""

import asyncio
import csv
import io
import json
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway.http.listener import GRACE_SECONDS
from gateway.keys import KeyFile
from gateway.keys.issuing import create_key
from serving.state.database import StateDatabase
from serving.state.usage import UsageDatabase
from tests.fakes.running import (
    DEADLINE_SECONDS,
    HOST,
    PATIENCE_SECONDS,
    POLL_SECONDS,
    ROOT,
    FakeReplica,
    eventually,
    running_fake,
)
from tests.gateway.fleet import CHAT, HELLO, STREAM, Fleet, deployment, running_gateway
from tests.gateway.test_workers import free_ports
from tests.gateway.wire import connected, posted
from tests.serving.state.conftest import postgresql, state

__all__ = ["postgresql", "state"]

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def report(admin: httpx.AsyncClient, **query: str) -> Any:
    """The report of a gateway."""
    answer = await admin.get("/admin/usage", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_requests_of_a_gateway(tmp_path: Path, fake: FakeReplica) -> None:
    """Answers, streams and refusals are counted by alias and precision, with the engine's own token counts."""
    recorded = replace(deployment(), state=f"sqlite:///{tmp_path}/state.db")
    async with running_gateway(recorded) as fleet:
        assert (await report(fleet.admin))["rows"] == []
        with fleet.replicas(("hi", fake.url), ("lo", fake.url)):
            usage = (await fleet.ask()).json()["usage"]
            await fleet.ask(STREAM)
            await fleet.ask({**HELLO, "model": "team/small"})
            assert (await fleet.ask({**HELLO, "model": "nothing"})).status_code == 404
            await fleet.at_rest()
        told = await report(fleet.admin)
        rows = {(row["key"], row["alias"], row["precision"]): row for row in told["rows"]}
        assert {key: (row["requests"], row["errors"]) for key, row in rows.items()} == {
            ("none", "smol", "bf16"): (2, 0),
            ("none", "team/small", "int4"): (1, 0),
            ("none", "_unknown", "none"): (1, 1),
        }
        small = rows["none", "team/small", "int4"]
        assert (small["prompt_tokens"], small["completion_tokens"]) == (
            *(usage["prompt_tokens"], usage["completion_tokens"]),
        )
        assert 0 < small["seconds"] < DEADLINE_SECONDS
        assert told["total"]["requests"] == 4
        by_precision = await report(fleet.admin, by="precision", since="1h")
        assert [(row["precision"], row["alias"]) for row in by_precision["rows"]] == [
            *[("bf16", None), ("int4", None), ("none", None)],
        ]
        assert await fleet.total("quantgate_usage_pending_requests") == 0


async def test_written_before_the_admin_port_closes(tmp_path: Path, fake: FakeReplica) -> None:
    """A trial holds up the end of the admin port, and not what was counted before."""
    url = f"sqlite:///{tmp_path}/state.db"
    database = UsageDatabase(StateDatabase.at(url, create=False))

    async def written() -> float:
        await eventually(lambda: any(group.usage.requests for group in database.grouped((), 0, 2**40)))
        return time.monotonic()

    async with running_fake("--fake-stall-before-first-byte") as stalling, AsyncExitStack() as peers:
        async with running_gateway(replace(deployment(), state=url)) as fleet:
            with fleet.replicas(("hi", fake.url)):
                await fleet.ask()
                await fleet.at_rest()
            with fleet.replicas(("hi", stalling.url)):
                peer = await peers.enter_async_context(connected(fleet.served.addresses.admin))
                await peer.say(posted(HELLO, "/admin/trial"))
                await stalling.requested(CHAT)
            writing, began = asyncio.create_task(written()), time.monotonic()
        ended = time.monotonic()
    assert await writing < min(began + GRACE_SECONDS, ended - 1)


async def test_refusals(fleet: Fleet, tmp_path: Path) -> None:
    """A gateway without a record says so; an invalid query and a database that is away are errors, too."""
    assert (await fleet.admin.get("/admin/usage")).status_code == 404
    recorded = replace(deployment(), state=f"sqlite:///{tmp_path}/missing/state.db")
    async with running_gateway(recorded) as other:
        answer = await other.admin.get("/admin/usage", params={"by": "user"})
        assert (answer.status_code, answer.json()["detail"][:6]) == (400, "'user'")
        await other.ask()
        answer = await other.admin.get("/admin/usage")
        assert answer.status_code == 503
        assert answer.json()["detail"].endswith("; usage is kept in memory until it is back")


@dataclass(frozen=True)
class Gateways:
    """Worker processes of one gateway, or a single one."""

    config: Path
    client: str
    admins: Sequence[str]
    pid: int

    async def ask(self, count: int, key: str) -> None:
        """Send requests, each over a connection of its own, which the kernel spreads over the workers."""
        for _ in range(count):
            async with httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as client:
                answer = await client.post(
                    f"{self.client}{CHAT}", json=HELLO, headers={"authorization": f"Bearer {key}"}
                )
                assert answer.status_code == 200

    async def requests(self, admin: str) -> int:
        """All requests, as a worker tells."""
        async with httpx.AsyncClient(base_url=admin, timeout=DEADLINE_SECONDS, trust_env=False) as client:
            total = (await report(client))["total"]
            return int(total["requests"])


@asynccontextmanager
async def gateways(config: Path, workers: int) -> AsyncIterator[Gateways]:
    """Run `quantgate gateway`; it gets SIGTERM at the end, if it still runs."""
    settings = yaml.safe_load(config.read_text())["gateway"]
    first = int(settings["admin"].rpartition(":")[2])
    admins = [f"http://{HOST}:{first + number}" for number in range(workers)]
    command = ("-m", "quantgate", "gateway", str(config), "--workers", str(workers), "--force")
    process = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=ROOT, stderr=DEVNULL)
    try:
        async with (
            asyncio.timeout(2 * PATIENCE_SECONDS),
            httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as client,
        ):
            while not all([await ready(client, admin) for admin in admins]):  # noqa: ASYNC110 - other processes
                await asyncio.sleep(POLL_SECONDS)
        yield Gateways(config, f"http://{settings['listen']}", admins, process.pid)
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(2 * DEADLINE_SECONDS):
            await process.wait()


async def ready(client: httpx.AsyncClient, admin: str) -> bool:
    """Whether a worker answers requests."""
    try:
        return (await client.get(f"{admin}/readyz")).status_code == 200
    except httpx.TransportError:
        return False


def configuration(folder: Path, state: str, fake: FakeReplica) -> tuple[Path, str]:
    """A configuration with one key."""
    client, admin, _ = free_ports(3)
    settings = {
        "gateway": {"listen": f"{HOST}:{client}", "admin": f"{HOST}:{admin}", "state": state, "keys": "keys.yaml"},
        "variants": {"hi": {"precision": "bf16"}},
        "replicas": [{"variant": "hi", "url": fake.url}],
        "aliases": {"smol": {"ladder": ["hi"]}},
    }
    config = folder / "quantgate.yaml"
    config.write_text(yaml.safe_dump(settings))
    return config, create_key(KeyFile(folder / "keys.yaml"), "team-a")


async def test_workers_restarts_and_kills(tmp_path: Path, state: str, fake: FakeReplica) -> None:
    """Workers that drain have written everything; one that is killed loses what it had not written yet, no more."""
    config, key = configuration(tmp_path, state, fake)
    async with gateways(config, 2) as running:
        await running.ask(20, key)
    async with gateways(config, 1) as running:
        assert await running.requests(running.admins[0]) == 20
        await running.ask(5, key)
        assert await running.requests(running.admins[0]) == 25
        await running.ask(3, key)
        # The three are in its memory only: it writes every 10 s, and when it is asked.
        os.kill(running.pid, signal.SIGKILL)
    async with gateways(config, 1) as running:
        assert await running.requests(running.admins[0]) in range(25, 29)
        if state.startswith("sqlite"):
            await check_command(config)


async def check_command(config: Path) -> None:
    """`quantgate usage` prints a table, JSON and CSV; the key's name is in it, never the key."""
    code, table, err = await usage(config)
    assert (code, table.split("\n")[0].split()[:4]) == (0, ["key", "alias", "precision", "requests"])
    assert " to " in err
    _, text, _ = await usage(config, "--json", "--by", "key")
    told = json.loads(text)
    (row,) = told["rows"]
    assert (row["key"], row["alias"], told["by"]) == ("team-a", None, ["key"])
    _, text, _ = await usage(config, "--csv", "--by", "day,key", "--since", "2d")
    (line,) = csv.DictReader(io.StringIO(text))
    assert line["start"].endswith("T00:00:00Z")
    assert int(line["requests"]) == row["requests"]
    code, _, err = await usage(config, "--by", "user")
    assert (code, "'user' is not a dimension of usage" in err) == (2, True)
    code, _, err = await usage(config, "--admin", f"{HOST}:1")
    assert (code, "no gateway answers" in err) == (1, True)


async def usage(config: Path, *options: str) -> tuple[int, str, str]:
    """Run the command; exit code, stdout and stderr."""
    command = (sys.executable, "-m", "quantgate", "usage", "--config", str(config), *options)
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=PIPE, stderr=PIPE)
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()
