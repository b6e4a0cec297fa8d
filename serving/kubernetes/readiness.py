"""Whether Kubernetes lists a ready pod: one look, for commands that run outside of a gateway."""

from collections.abc import Iterable

from serving.kubernetes.access import ClusterAccess
from serving.kubernetes.api import KubernetesApi, Resource
from serving.kubernetes.endpoints import EndpointSlice, listed, pod_endpoints
from serving.kubernetes.sources import PodSource


async def has_ready_pod(access: ClusterAccess, sources: Iterable[PodSource]) -> bool:
    """Look for a ready pod among those of some entries; KubernetesError if the API server does not say."""
    async with KubernetesApi(access) as api:
        for source in sources:
            resource = Resource("discovery.k8s.io", "v1", "endpointslices", source.namespace or access.namespace)
            slices = listed((await api.list(resource, EndpointSlice, source.selector)).items)
            pods = pod_endpoints(slices, source.port, source.pod.variant).values()
            if any(pod.standing == "ready" for pod in pods):
                return True
    return False
