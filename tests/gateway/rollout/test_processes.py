"""Rollouts across real processes: supervisors start and stop the replicas, gateways die and go on."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway.rollout.machine import Phase
from gateway.rollout.operating import Operator, Replacement
from gateway.rollout.plan import PlanSettings
from serving.replica import State
from tests.fakes.running import DEADLINE_SECONDS, HOST, ROOT, eventually
from tests.gateway.fleet import CHAT
from tests.gateway.rollout.driving import ONLY_ERRORS
from tests.gateway.test_workers import free_ports
from tests.serving.supervised import model_directory

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(240), pytest.mark.long_wait]
PATIENCE = 150.0


def write(folder: Path) -> Path:
    """A configuration whose alias has one variant, and a second variant without replicas."""
    client, admin, _ = free_ports(3)
    document = {
        "gateway": {
            "listen": f"{HOST}:{client}",
            "admin": f"{HOST}:{admin}",
            "state": f"sqlite:///{folder}/state.db",
            "drain_seconds": 2,
        },
        "variants": {name: {"path": str(model_directory(folder / name))} for name in ("old", "new")},
        "replicas": [{"variant": "old", "drain_seconds": 5}],
        "aliases": {"smol": {"ladder": ["old"]}},
    }
    path = folder / "quantgate.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


async def start(home: Path, *words: str) -> Process:
    """Start a program of ours, with its own home."""
    env = {**os.environ, "QUANTGATE_HOME": str(home)}
    log = (home / "log").open("ab")
    with log:
        return await asyncio.create_subprocess_exec(
            sys.executable, *words, cwd=ROOT, env=env, stdin=DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


@dataclass
class Talk:
    """Conversations of three turns; answers by conversation. A gateway that is away is no answer."""

    url: str
    variants: dict[int, set[str]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    number: int = 0

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=DEADLINE_SECONDS, trust_env=False) as client:
            while True:
                self.number += 1
                await self._conversation(client, self.number)

    async def _conversation(self, client: httpx.AsyncClient, number: int) -> None:
        messages: list[dict[str, Any]] = [{"role": "user", "content": f"question {number}"}]
        for _ in range(3):
            try:
                answer = await client.post(CHAT, json={"model": "smol", "messages": messages})
            except httpx.TransportError:
                await asyncio.sleep(0.1)
                return
            if answer.status_code != 200:
                self.failed.append(answer.text)
                return
            # Right after a start the new variant may not be adopted yet: then the old one answers for it.
            if answer.headers["x-quantgate-reason"] not in ("spill", "fallback"):
                self.variants.setdefault(number, set()).add(answer.headers["x-quantgate-variant"])
            messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "and then?"}]


@asynccontextmanager
async def talking(url: str) -> AsyncIterator[Talk]:
    talk = Talk(url)
    task = asyncio.create_task(talk.run())
    try:
        yield talk
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def end(*processes: Process) -> None:
    for process in processes:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        await asyncio.wait_for(process.wait(), 30)


@pytest.mark.parametrize("together", [True, False], ids=["up", "serve and gateway"])
async def test_the_gateway_is_killed_in_the_middle(tmp_path: Path, together: bool) -> None:
    """Its successor goes on from the record: no conversation has moved, and at the end the old processes are gone."""
    config, home, other = write(tmp_path), tmp_path / "home", tmp_path / "gateway"
    home.mkdir()
    other.mkdir()
    serve = ("-m", "tests.fakes.serve", str(config), str(home))
    gateway = (*serve, "up") if together else ("quantgate.py", "gateway", str(config), "--workers", "2", "--force")
    gateway_home = home if together else other
    processes = [] if together else [await start(home, *serve)]
    front = await start(gateway_home, *gateway)
    operator = Operator.of(config, create=True)
    settings = yaml.safe_load(config.read_text())["gateway"]
    try:
        await eventually(lambda: operator.is_ready("old"), PATIENCE)
        plan = operator.plan(
            Replacement("smol", "new"),
            PlanSettings(steps=(50, 100), step_seconds=2, keep=2, drain_seconds=2, skip=ONLY_ERRORS),
        )
        operator.start(plan, "")
        async with talking(f"http://{settings['listen']}") as talk:
            await eventually(lambda: operator.latest("smol").phase == Phase.CANARY, PATIENCE)
            seen = talk.number
            await eventually(lambda: talk.number > seen + 20, PATIENCE)
            os.killpg(front.pid, signal.SIGKILL)
            await front.wait()
            front = await start(gateway_home, *gateway)
            await eventually(lambda: operator.latest("smol").phase in (Phase.DONE, Phase.ROLLED_BACK), PATIENCE)
        assert operator.latest("smol").phase == Phase.DONE, operator.latest("smol").state
        assert talk.failed == []
        moved = {number: used for number, used in talk.variants.items() if len(used) > 1}
        assert moved == {}
        assert set().union(*talk.variants.values()) == {"old", "new"}

        def states() -> dict[str, State]:
            records = operator.database.database.snapshot().records
            return {record.replica.variant: record.state for _, record in records}

        await eventually(lambda: states() == {"new": State.READY}, PATIENCE)
    finally:
        operator.close()
        await end(front, *processes)
