"""What the entries of the configuration with `kubernetes` look for. Pure."""

from collections.abc import Iterable, Mapping
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


@dataclass(frozen=True, slots=True)
class FoundPod:
    """A pod, and the entry of the configuration that it belongs to."""

    source: PodSource
    pod: PodEndpoint

    @property
    def replica(self) -> Replica:
        """The replica that it is."""
        return replace(self.source.pod, id=self.pod.id, url=self.pod.url)


Pods = Mapping[str, PodEndpoint]  # by the id of the replica


def merged(entries: Iterable[tuple[PodSource, Pods]]) -> tuple[Mapping[str, FoundPod], tuple[str, ...]]:
    """Return the pods of all entries by id, and what is ambiguous: an id belongs to the first entry that has it.

    That an entry of the same variant has found the same pod is not ambiguous.
    """
    found, ambiguous = dict[str, FoundPod](), list[str]()
    for source, pods in entries:
        for replica_id, pod in pods.items():
            first = found.setdefault(replica_id, FoundPod(source, pod))
            if (first.source.pod.variant, first.pod.uid) != (source.pod.variant, pod.uid):
                ambiguous.append(_ambiguity(first, FoundPod(source, pod)))
    return found, tuple(ambiguous)


def _ambiguity(first: FoundPod, other: FoundPod) -> str:
    what = "the pod" if first.pod.uid == other.pod.uid else "another pod of that name"
    return (
        f"the pod {first.pod.id} is a replica of {first.source.pod.variant} ({first.source.selector}); {what} is found "
        f"for {other.source.pod.variant} ({other.source.selector}), too, and not used there; change one of the entries"
    )


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
