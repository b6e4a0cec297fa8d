"""A gateway under steady load, whose replicas are pods of a fake cluster: no fault of that breaks a request.

The API server is away for as long as the gateway takes to answer some hundred requests, rather than for a minute: no
time that the gateway waits for lies in between.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway.deployment import read_deployment
from gateway.process import gateway_alone
from tests.fakes.kubernetes.running import FakeCluster, running_cluster
from tests.fakes.running import FakeReplica, eventually
from tests.gateway.fleet import clients
from tests.gateway.load import Load
from tests.serving.kubernetes.faults import FAULTS, Fault
from tests.serving.kubernetes.pods import SERVICE, addresses, pods

REQUESTS = 150


def write(folder: Path, cluster: FakeCluster, **entry: Any) -> Path:
    """Write a configuration whose replicas are pods."""
    found = {"variant": "int8", "kubernetes": {"service": SERVICE}, **entry}
    variant = found["variant"]
    document = {
        "gateway": {
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
            "kubernetes": {"server": cluster.url, "token_file": str(cluster.token_file)},
        },
        "variants": {variant: {"precision": "int8"}},
        "replicas": [found],
        "aliases": {"smol": {"ladder": [variant]}},
    }
    path, draft = folder / "quantgate.yaml", folder / "draft"
    draft.write_text(yaml.safe_dump(document))
    draft.replace(path)
    return path


@dataclass(slots=True)
class Scene:
    """A gateway under load, and the cluster that its replicas are in."""

    cluster: FakeCluster
    admin: httpx.AsyncClient
    load: Load
    path: Path

    async def status(self) -> Any:
        """The status of the gateway."""
        return (await self.admin.get("/admin/status")).json()

    async def replicas(self) -> dict[str, str]:
        """The states of the replicas by address."""
        return {each["url"]: each["state"] for each in (await self.status())["replicas"]}

    async def settled(self, *fakes: FakeReplica) -> None:
        """Return when exactly these servers are ready, and there are no others."""

        async def same() -> bool:
            return await self.replicas() == {fake.url: "ready" for fake in fakes}

        await eventually(same)

    async def answered(self, requests: int = REQUESTS) -> None:
        """Return when so many more requests have been answered."""
        before = sum(self.load.answers.values())
        await eventually(lambda: sum(self.load.answers.values()) >= before + requests)


@asynccontextmanager
async def under_load(folder: Path, fakes: tuple[FakeReplica, ...], count: int) -> AsyncIterator[Scene]:
    """Run a gateway in front of `count` pods under load; on exit, no request was broken."""
    async with running_cluster() as cluster:
        await cluster.add_workload(SERVICE, count, addresses(fakes), terminating_seconds=1.0)
        path = write(folder, cluster)
        async with gateway_alone(read_deployment(path), path) as served, clients(served) as (client, admin):
            scene = Scene(cluster, admin, Load(client), path)
            await scene.settled(*fakes[:count])
            task = asyncio.create_task(scene.load.run())
            await scene.answered(20)
            yield scene
            scene.load.stop.set()
            await task
            assert scene.load.broken == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_no_fault_of_the_api_server_breaks_a_request(tmp_path: Path, fault: Fault) -> None:
    """Requests are answered by the pods that were found, and a pod that came meanwhile gets some afterwards."""
    async with pods(3) as fakes, under_load(tmp_path, fakes, 2) as scene:
        await fault.begin(scene.cluster)
        if fault.answers:
            await scene.cluster.scale(SERVICE, 3)
        await scene.answered()
        if fault.end is not None:
            await eventually(lambda: is_away(scene))
            await fault.end(scene.cluster)
        if not fault.answers:
            await scene.cluster.scale(SERVICE, 3)
        await scene.settled(*fakes)
        await eventually(lambda: len(scene.load.answers) == 3)


async def is_away(scene: Scene) -> bool:
    """Whether operators are told: by /readyz, which is still 200, by the status, and by a metric."""
    probe, metrics = await scene.admin.get("/readyz"), await scene.admin.get("/metrics")
    assert probe.status_code == 200
    told = ["kubernetes" in probe.json(), (await scene.status())["gateway"]["kubernetes"] is not None]
    return all([*told, 'quantgate_discovery_connected{variant="int8"} 0.0' in metrics.text])


@pytest.mark.parametrize("delete_first", [False, True])
async def test_other_slices_break_no_request(tmp_path: Path, delete_first: bool) -> None:
    """The endpoints move from one slice to several and back."""
    async with pods(2) as fakes, under_load(tmp_path, fakes, 2) as scene:
        for size in (1, 2, 1):
            await scene.cluster.reshuffle(SERVICE, endpoints_per_slice=size, delete_first=delete_first)
            await scene.answered(50)
        await scene.settled(*fakes)


async def test_a_pod_that_terminates_breaks_no_request(tmp_path: Path) -> None:
    """It finishes what it has and gets nothing new; its series leave with it."""
    async with pods(3) as fakes, under_load(tmp_path, fakes, 3) as scene:
        gone = {each["url"]: each["id"] for each in (await scene.status())["replicas"]}[fakes[2].url]
        assert gone in (await scene.admin.get("/metrics")).text
        await scene.cluster.scale(SERVICE, 2)
        await scene.settled(*fakes[:2])
        before = len(fakes[2].requests("/v1/chat/completions"))
        await scene.answered()
        assert len(fakes[2].requests("/v1/chat/completions")) == before
        assert f'replica="{gone}"' not in (await scene.admin.get("/metrics")).text


@pytest.mark.parametrize(
    "change", [{"variant": "renamed"}, {"kubernetes": {"service": SERVICE, "namespace": "default"}}]
)
async def test_the_only_pod_stays_when_its_entry_changes(tmp_path: Path, change: dict[str, Any]) -> None:
    """At no time there is no ready replica, and in the end it is what the entry says."""
    async with pods(1) as fakes, under_load(tmp_path, fakes, 1) as scene:
        write(tmp_path, scene.cluster, max_in_flight=7, **change)

        async def changed() -> bool:
            (found,) = (await scene.status())["replicas"]
            assert found["state"] == "ready"
            return (found["max_in_flight"], found["variant"]) == (7, change.get("variant", "int8"))

        await eventually(changed)
        await scene.answered()
        await scene.settled(*fakes)


async def test_a_changed_entry_breaks_no_request(tmp_path: Path) -> None:
    """The pods are verified again with what the entry says now."""
    async with pods(2) as fakes, under_load(tmp_path, fakes, 2) as scene:
        write(tmp_path, scene.cluster, max_in_flight=7)

        async def changed() -> bool:
            return {each["max_in_flight"] for each in (await scene.status())["replicas"]} == {7}

        await eventually(changed)
        await scene.settled(*fakes)
        await scene.answered()
