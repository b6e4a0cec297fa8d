"""The number of replicas of Deployments and LeaderWorkerSets: read and changed through their `scale` subresource.

https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/ and the API reference of `autoscaling/v2`
describe what is used here. A change carries the version that was read, so that two writers do not overwrite each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec

from serving.errors import WorkloadAutoscaled
from serving.kubernetes.api import KubernetesApi, Resource
from serving.kubernetes.workloads import Workload

# Group, version, plural and kind of what a rollout can scale, by its name in the configuration.
KINDS: Mapping[str, tuple[str, str, str, str]] = MappingProxyType(
    {
        "deployment": ("apps", "v1", "deployments", "Deployment"),
        "leaderworkerset": ("leaderworkerset.x-k8s.io", "v1", "leaderworkersets", "LeaderWorkerSet"),
    }
)
KEDA_LABEL = "scaledobject.keda.sh/name"


class _Metadata(msgspec.Struct, frozen=True, rename="camel"):
    name: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None


class _Replicas(msgspec.Struct, frozen=True):
    replicas: int = 0


class Scale(msgspec.Struct, frozen=True):
    """How many replicas a workload shall have (`spec`), has (`status`), and the version of that."""

    metadata: _Metadata
    spec: _Replicas = _Replicas()
    status: _Replicas = _Replicas()


class _Target(msgspec.Struct, frozen=True, rename="camel"):
    kind: str
    name: str
    api_version: str = ""


class _AutoscalerSpec(msgspec.Struct, frozen=True, rename="camel"):
    scale_target_ref: _Target


class _Autoscaler(msgspec.Struct, frozen=True):
    metadata: _Metadata
    spec: _AutoscalerSpec


@dataclass(frozen=True, slots=True)
class WorkloadScale:
    """Reads and changes the number of replicas. Every call may raise KubernetesError."""

    api: KubernetesApi

    async def read(self, workload: Workload) -> Scale:
        """Return the number of replicas now; ApiNotFound if there is no such workload."""
        return await self.api.get(_resource(workload), workload.name, Scale, "scale")

    async def write(self, workload: Workload, seen: Scale, replicas: int) -> Scale:
        """Change the number of replicas; ApiConflict if the workload has changed since `seen` was read."""
        body: dict[str, Any] = {
            "metadata": {"resourceVersion": seen.metadata.resource_version},
            "spec": {"replicas": replicas},
        }
        return await self.api.patch(_resource(workload), workload.name, Scale, body, "scale")

    async def check_manual(self, workload: Workload) -> None:
        """Raise WorkloadAutoscaled if a HorizontalPodAutoscaler scales the workload: both would change the number."""
        resource = Resource("autoscaling", "v2", "horizontalpodautoscalers", workload.namespace)
        for autoscaler in (await self.api.list(resource, _Autoscaler)).items:
            if _targets(autoscaler.spec.scale_target_ref, workload):
                raise WorkloadAutoscaled(_autoscaled(autoscaler, workload))


def _resource(workload: Workload) -> Resource:
    group, version, plural, _ = KINDS[workload.kind]
    return Resource(group, version, plural, workload.namespace)


def _targets(target: _Target, workload: Workload) -> bool:
    group, _, _, kind = KINDS[workload.kind]
    return (target.kind, target.name) == (kind, workload.name) and target.api_version.partition("/")[0] in ("", group)


def _autoscaled(autoscaler: _Autoscaler, workload: Workload) -> str:
    name = autoscaler.metadata.name
    said = f"{workload} in the namespace {workload.namespace} is scaled by the HorizontalPodAutoscaler {name}"
    keda = (autoscaler.metadata.labels or {}).get(KEDA_LABEL)
    if keda is not None:
        return (
            f"{said} of KEDA; pause its ScaledObject for the rollout: annotate {keda} with autoscaling.keda.sh/paused"
        )
    return f"{said}; delete it for the rollout, or remove `workload` from the configuration and scale by hand"
