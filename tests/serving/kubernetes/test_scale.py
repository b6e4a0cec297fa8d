"""Scaling workloads of the fake cluster: what is read, what is written, and what is refused."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from config.schema import ReplicaSettings
from serving.errors import ApiConflict, ApiForbidden, ApiNotFound, ApiServerAway, WorkloadAutoscaled
from serving.kubernetes.access import ClusterAccess
from serving.kubernetes.api import KubernetesApi
from serving.kubernetes.scale import WorkloadScale
from serving.kubernetes.workloads import Workload, workloads_of
from tests.fakes.kubernetes.running import FakeCluster, WorkloadKind, running_cluster
from tests.fakes.running import HOST

WEB = Workload("deployment", "web", "default")


@asynccontextmanager
async def scaling(cluster: FakeCluster) -> AsyncIterator[WorkloadScale]:
    async with KubernetesApi(ClusterAccess(cluster.url, token_file=cluster.token_file)) as api:
        yield WorkloadScale(api)


def autoscaler(name: str, kind: str, target: str, **labels: str) -> dict[str, Any]:
    versions = {"Deployment": "apps/v1", "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1"}
    reference = {"apiVersion": versions[kind], "kind": kind, "name": target}
    return {"metadata": {"name": name, "labels": labels}, "spec": {"scaleTargetRef": reference, "maxReplicas": 5}}


@pytest.mark.parametrize("kind", ["deployment", "leaderworkerset"])
async def test_up_and_down(kind: WorkloadKind) -> None:
    """Each change starts from what was read; zero is a number, too."""
    async with running_cluster() as cluster, scaling(cluster) as scale:
        await cluster.add_workload("web", 0, [(HOST, 8001), (HOST, 8002)], kind=kind)
        workload = Workload(kind, "web", "default")
        for replicas in (2, 0):
            seen = await scale.read(workload)
            assert (await scale.write(workload, seen, replicas)).spec.replicas == replicas
            assert await cluster.replicas("web", kind) == replicas


async def test_somebody_else_was_faster() -> None:
    """A change of what is not the latest version is refused, and changes nothing."""
    async with running_cluster() as cluster, scaling(cluster) as scale:
        await cluster.add_workload("web", 1, [(HOST, 8001), (HOST, 8002)])
        seen = await scale.read(WEB)
        await cluster.scale("web", 2)
        with pytest.raises(ApiConflict, match="the object has been modified"):
            await scale.write(WEB, seen, 0)
        assert await cluster.replicas("web") == 2


@pytest.mark.parametrize(
    "found, message",
    [
        (autoscaler("web-load", "Deployment", "web"), "HorizontalPodAutoscaler web-load; delete it for the rollout"),
        (
            autoscaler("keda-hpa-web", "Deployment", "web", **{"scaledobject.keda.sh/name": "web-queue"}),
            "HorizontalPodAutoscaler keda-hpa-web of KEDA; .* annotate web-queue with autoscaling.keda.sh/paused",
        ),
        (autoscaler("other", "Deployment", "api"), None),
        (autoscaler("groups", "LeaderWorkerSet", "web"), None),
    ],
)
async def test_an_autoscaler(found: dict[str, Any], message: str | None) -> None:
    """The one that scales the workload is named, with what to do; others are not in the way."""
    async with running_cluster() as cluster, scaling(cluster) as scale:
        await cluster.add_workload("web", 1, [(HOST, 8001)])
        await scale.check_manual(WEB)
        await cluster.create("horizontalpodautoscalers", found)
        if message is None:
            await scale.check_manual(WEB)
            return
        with pytest.raises(WorkloadAutoscaled, match=message):
            await scale.check_manual(WEB)


async def test_what_the_server_refuses() -> None:
    """A missing workload, a role that lacks a verb, a server that is away."""
    async with running_cluster() as cluster, scaling(cluster) as scale:
        with pytest.raises(ApiNotFound, match=r'deployments\.apps "web" not found'):
            await scale.read(WEB)
        await cluster.add_workload("web", 1, [(HOST, 8001)])
        await cluster.refuse(403, verbs=["patch"], resources=["deployments.apps/scale"])
        with pytest.raises(ApiForbidden, match="patch deployments/scale of apps in the namespace default"):
            await scale.write(WEB, await scale.read(WEB), 2)
        await cluster.kill()
        with pytest.raises(ApiServerAway):
            await scale.read(WEB)


def test_the_workloads_of_a_configuration() -> None:
    """By variant; an entry without a namespace is in the gateway's own."""
    entries = [
        {"variant": "lo", "url": "http://127.0.0.1:9"},
        {"variant": "lo", "kubernetes": {"service": "web"}},
        {"variant": "lo", "kubernetes": {"service": "web-a", "workload": "deployment/web-a"}},
        {"variant": "lo", "kubernetes": {"service": "web-b", "workload": "deployment/web-b"}},
        {"variant": "hi", "kubernetes": {"service": "big", "workload": "leaderworkerset/big", "namespace": "models"}},
    ]
    assert workloads_of(map(ReplicaSettings.model_validate, entries), "own") == {
        "lo": (Workload("deployment", "web-a", "own"), Workload("deployment", "web-b", "own")),
        "hi": (Workload("leaderworkerset", "big", "models"),),
    }
