"""Looks once at what discovery needs, for `quantgate doctor`: the verbs of the role, and pods."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from serving.errors import KubernetesError
from serving.kubernetes.access import ClusterAccess
from serving.kubernetes.api import KubernetesApi
from serving.kubernetes.endpoints import STANDINGS, EndpointSlice, listed, pod_endpoints, port_problem
from serving.kubernetes.sources import PodSource, endpoint_slices


@dataclass(frozen=True, slots=True)
class SourceCheck:
    """What is wrong with an entry of the configuration, or None, and its pods now, such as `2 ready, 1 not_ready`."""

    source: PodSource
    problem: str | None
    pods: str = "none"


async def check_sources(access: ClusterAccess, sources: Sequence[PodSource]) -> list[SourceCheck]:
    """List and watch the EndpointSlices of each entry once."""
    async with KubernetesApi(access) as api:
        return [await _check(api, source) for source in sources]


async def _check(api: KubernetesApi, source: PodSource) -> SourceCheck:
    resource = endpoint_slices(source.namespace or api.access.namespace)
    try:
        found = await api.list(resource, EndpointSlice, source.selector)
        async with api.watch(resource, EndpointSlice, found.version, source.selector):
            pass
    except KubernetesError as error:
        return SourceCheck(source, str(error))
    slices = listed(found.items)
    standings = Counter(pod.standing for pod in pod_endpoints(slices, source.port, source.pod.variant).values())
    pods = ", ".join(f"{standings[name]} {name}" for name in STANDINGS if standings[name])
    return SourceCheck(source, port_problem(slices, source.port), pods or "none")
