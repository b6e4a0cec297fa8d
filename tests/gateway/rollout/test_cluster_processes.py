"""Rollouts in a cluster, across real processes: gateways find the pods, and scale their Deployments."""

import asyncio
import os
import signal
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway.rollout.machine import Event, Phase
from gateway.rollout.operating import Operator, Replacement
from gateway.rollout.plan import PlanSettings
from tests.fakes.kubernetes.running import FakeCluster, running_cluster
from tests.fakes.running import HOST, FakeReplica, eventually, running_fake
from tests.gateway.rollout.driving import ONLY_ERRORS
from tests.gateway.rollout.test_processes import PATIENCE, end, start, talking
from tests.gateway.test_workers import free_ports
from tests.serving.state.databases import PostgreSQL

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300), pytest.mark.long_wait]
FAST: dict[str, Any] = {"steps": (50, 100), "step_seconds": 2, "keep": 2, "drain_seconds": 2, "skip": ONLY_ERRORS}
REPLICAS = 2


@dataclass
class Site:
    """A cluster with the pods of two variants, and gateways outside of it that share a state database."""

    folder: Path
    cluster: FakeCluster
    pods: dict[str, list[FakeReplica]]
    state: str
    gateways: dict[Process, Path] = field(default_factory=dict)

    async def add_gateway(self) -> Process:
        number = len(self.gateways)
        client, admin, *_ = free_ports(3)
        document = {
            "gateway": {
                "listen": f"{HOST}:{client}",
                "admin": f"{HOST}:{admin}",
                "state": self.state,
                "drain_seconds": 2,
                "kubernetes": {"server": self.cluster.url, "token_file": str(self.cluster.token_file)},
            },
            "variants": {"old": {"precision": "int8"}, "new": {"precision": "int8"}},
            "replicas": [
                {"variant": name, "kubernetes": {"service": name, "workload": f"deployment/{name}"}}
                for name in ("old", "new")
            ],
            "aliases": {"smol": {"ladder": ["old"]}},
        }
        home = self.folder / f"gateway-{number}"
        home.mkdir()
        config = home / "quantgate.yaml"
        config.write_text(yaml.safe_dump(document))
        process = await start(home, "quantgate.py", "gateway", str(config))
        self.gateways[process] = config
        return process

    def url(self, gateway: Process, port: str = "listen") -> str:
        address = yaml.safe_load(self.gateways[gateway].read_text())["gateway"][port]
        return f"http://{address}"

    def operator(self) -> Operator:
        return Operator.of(next(iter(self.gateways.values())), create=True)

    async def serves(self, gateway: Process) -> bool:
        """Whether a gateway can answer the alias."""
        async with httpx.AsyncClient(trust_env=False) as client:
            try:
                return (await client.get(f"{self.url(gateway, 'admin')}/readyz")).is_success
            except httpx.TransportError:
                return False

    async def sizes(self) -> tuple[int, int]:
        """The replicas of the old Deployment and the new one."""
        return await self.cluster.replicas("old"), await self.cluster.replicas("new")

    async def sized(self, old: int, new: int) -> bool:
        async def look() -> bool:
            return await self.sizes() == (old, new)

        return await eventually(look, PATIENCE)


@asynccontextmanager
async def site(folder: Path, state: str, new_flags: Sequence[str] = (), gateways: int = 1) -> AsyncIterator[Site]:
    """The old Deployment has its replicas, the new one none."""
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(running_cluster())
        pods: dict[str, list[FakeReplica]] = {}
        for name, flags, replicas in (("old", (), REPLICAS), ("new", new_flags, 0)):
            pods[name] = [await stack.enter_async_context(running_fake(*flags)) for _ in range(REPLICAS)]
            places = [(HOST, pod.port) for pod in pods[name]]
            await cluster.add_workload(name, replicas, places, start_seconds=0.2, terminating_seconds=1.0)
        made = Site(folder, cluster, pods, state)
        try:
            for _ in range(gateways):
                gateway = await made.add_gateway()
                await eventually(lambda: made.serves(gateway), PATIENCE)  # noqa: B023 - awaited in the loop
            yield made
        finally:
            await end(*made.gateways)


def begin(operator: Operator, **settings: Any) -> None:
    operator.start(operator.plan(Replacement("smol", "new"), PlanSettings(**{**FAST, **settings})), "")


async def reached(operator: Operator, *phases: Phase) -> Phase:
    return await eventually(
        lambda: found if (found := Phase(operator.latest("smol").phase)) in phases else None, PATIENCE
    )


async def test_a_good_variant_is_promoted(tmp_path: Path) -> None:
    """No request fails; the new Deployment is scaled up first, and the old one down to nothing after `keep`."""
    async with site(tmp_path, f"sqlite:///{tmp_path}/state.db") as made:
        operator = made.operator()
        begin(operator)
        (gateway,) = made.gateways
        async with talking(made.url(gateway)) as talk:
            assert await reached(operator, Phase.KEEPING, Phase.ROLLED_BACK) is Phase.KEEPING
            assert await made.sizes() == (REPLICAS, REPLICAS)
            await reached(operator, Phase.DONE)
            await made.sized(0, REPLICAS)
            seen = talk.number
            await eventually(lambda: talk.number > seen + 20, PATIENCE)
        assert talk.failed == []
        assert [used for used in talk.variants.values() if len(used) > 1] == []
        assert talk.variants[max(talk.variants)] == {"new"}
        served = [len(pod.requests("/v1/chat/completions")) for pod in made.pods["new"]]
        assert all(served), "every pod of the new Deployment has answered"
        operator.close()


async def test_a_bad_variant_is_rolled_back(tmp_path: Path) -> None:
    """The smoke test finds it; its Deployment is scaled down again, and the old one was never touched."""
    flags = ("--fake-fail-first", "100000", "--fake-fail-status", "500")
    async with site(tmp_path, f"sqlite:///{tmp_path}/state.db", flags) as made:
        operator = made.operator()
        (gateway,) = made.gateways
        async with talking(made.url(gateway)) as talk:
            begin(operator, smoke_seconds=60)
            assert await reached(operator, Phase.ROLLED_BACK, Phase.DONE) is Phase.ROLLED_BACK
            await made.sized(REPLICAS, 0)
        assert talk.failed == []
        figures = [(entry.event, entry.why) for entry in operator.database.entries("smol") if "scal" in entry.event]
        assert ("scaled", "deployment/new has 0 replicas") in figures
        assert not any("deployment/old" in why for _, why in figures)
        operator.close()


async def test_the_driver_is_killed_in_the_middle(tmp_path: Path, postgresql: PostgreSQL) -> None:
    """Another gateway goes on with the rollout, and scales what is left to scale."""
    async with site(tmp_path, postgresql.new_database(), gateways=2) as made:
        operator = made.operator()
        begin(operator)
        await reached(operator, Phase.CANARY)
        holder = operator.database.lease_holder("smol", time.time())
        assert holder is not None
        driver = next(each for each in made.gateways if f"-{each.pid}-" in holder)
        other = next(each for each in made.gateways if each is not driver)
        async with talking(made.url(other)) as talk:
            await eventually(lambda: talk.number > 5, PATIENCE)
            os.killpg(driver.pid, signal.SIGKILL)
            await driver.wait()
            assert await reached(operator, Phase.DONE, Phase.ROLLED_BACK) is Phase.DONE
            await made.sized(0, REPLICAS)
        assert talk.failed == []
        assert f"-{other.pid}-" in (operator.database.entries("smol")[-1].by)
        operator.close()


async def test_commands_see_the_pods(tmp_path: Path) -> None:
    """`undo` while the old variant is kept goes back at once: a command asks the API server which pods are ready."""
    async with site(tmp_path, f"sqlite:///{tmp_path}/state.db") as made:
        operator = made.operator()
        (gateway,) = made.gateways
        async with talking(made.url(gateway)) as talk:
            begin(operator, keep=600)
            assert await reached(operator, Phase.KEEPING, Phase.ROLLED_BACK) is Phase.KEEPING
            state = await asyncio.to_thread(operator.steer, "smol", Event.UNDO, "complaints")
            assert state.phase is Phase.ROLLING_BACK
            await reached(operator, Phase.ROLLED_BACK)
            await made.sized(REPLICAS, 0)
        assert talk.failed == []
        operator.close()
