"""What the entries of the configuration with `kubernetes` look for. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from config.schema import ReplicaSettings
from config.variant import Variant
from serving.kubernetes.api import Resource
from serving.kubernetes.endpoints import PodEndpoint
from serving.replica import Replica, foreign_replica


@dataclass(frozen=True, slots=True)
class PodSource:
    """An entry of the configuration: which EndpointSlices it reads, and what the servers of their pods are.

    `namespace` None is that of the gateway's own pod. `pod` is a replica without id and address.
    """

    selector: str
    namespace: str | None
    port: int | str | None
    pod: Replica

    @property
    def key(self) -> tuple[str | None, str]:
        """Which slices it reads; unique in a configuration."""
        return self.namespace, self.selector

    def replica(self, endpoint: PodEndpoint) -> Replica:
        """Return the replica that an endpoint is."""
        return replace(self.pod, id=endpoint.id, url=endpoint.url)


def endpoint_slices(namespace: str) -> Resource:
    """Return the resource that lists the pods of Services."""
    return Resource("discovery.k8s.io", "v1", "endpointslices", namespace)


def pod_sources(replicas: tuple[ReplicaSettings, ...], variants: Mapping[str, Variant]) -> tuple[PodSource, ...]:
    """Return the entries with `kubernetes`."""
    return tuple(
        PodSource(
            found.label_selector,
            found.namespace,
            found.port,
            foreign_replica(settings, variants[settings.variant], "", ""),
        )
        for settings in replicas
        if (found := settings.kubernetes) is not None
    )
