"""What a rollout scales: the Deployments and LeaderWorkerSets that a configuration names. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from config.schema import ReplicaSettings


@dataclass(frozen=True, slots=True)
class Workload:
    """A Deployment or LeaderWorkerSet; `kind` is `deployment` or `leaderworkerset`."""

    kind: str
    name: str
    namespace: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


Workloads = Mapping[str, tuple[Workload, ...]]  # by variant


def workloads_of(replicas: Iterable[ReplicaSettings], namespace: str) -> Workloads:
    """Return the workloads that a configuration names; `namespace` is used where an entry names none."""
    found: dict[str, tuple[Workload, ...]] = {}
    for entry in replicas:
        pods = entry.kubernetes
        if pods is not None and pods.workload is not None:
            kind, _, name = pods.workload.partition("/")
            workload = Workload(kind, name, pods.namespace or namespace)
            found[entry.variant] = (*found.get(entry.variant, ()), workload)
    return found
