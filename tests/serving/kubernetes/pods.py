"""Fake vLLM servers as pods of a fake cluster, and a discovery that finds them."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from config.golden import GoldenAnswer
from config.schema import ReplicaSettings
from config.variant import PARENT_QUALITY, Variant
from serving.backoff import Backoff
from serving.kubernetes.access import ClusterAccess
from serving.kubernetes.discovery import Discovery
from serving.kubernetes.sources import PodSource, pod_sources
from serving.probe import Probe
from serving.registry import Registry
from serving.replica import State
from tests.fakes.kubernetes.running import FakeCluster, running_cluster
from tests.fakes.running import HOST, FakeReplica, running_fake

SERVICE = "qwq"
NO_GOLDENS: Mapping[str, GoldenAnswer] = {}
QUICK = Backoff(first_seconds=0.02, longest_seconds=0.1)


def sources(variant: str = "int8", **kubernetes: object) -> tuple[PodSource, ...]:
    """The entry of a configuration that finds the pods of the service, or what `kubernetes` says."""
    found = kubernetes if "selector" in kubernetes else {"service": SERVICE, **kubernetes}
    entry = {"variant": variant, "kubernetes": found}
    return pod_sources((ReplicaSettings.model_validate(entry),), {variant: Variant(variant, variant, PARENT_QUALITY)})


@asynccontextmanager
async def pods(count: int, *flags: str) -> AsyncIterator[tuple[FakeReplica, ...]]:
    """Fake vLLM servers, for pods to run."""
    async with AsyncExitStack() as stack:
        yield tuple([await stack.enter_async_context(running_fake(*flags)) for _ in range(count)])


def addresses(fakes: tuple[FakeReplica, ...]) -> list[tuple[str, int]]:
    """Where they listen."""
    return [(HOST, fake.port) for fake in fakes]


@dataclass(slots=True)
class Scene:
    """A fake cluster, the registry of what is found in it, and every state that a replica has been in."""

    cluster: FakeCluster
    registry: Registry
    discovery: Discovery
    states: dict[str, list[State]] = field(default_factory=dict)

    def note(self) -> None:
        """Note the states of replicas that have changed."""
        for status in self.registry.snapshot():
            seen = self.states.setdefault(status.replica.id, [])
            if not seen or seen[-1] is not status.state:
                seen.append(status.state)

    def ready(self) -> set[str]:
        """The addresses of the ready replicas."""
        return {each.replica.url for each in self.registry.snapshot() if each.state is State.READY}


def slice_of(name: str, service: str, uid: str, fake: FakeReplica, pod: str = "qwq-0") -> dict[str, Any]:
    """An EndpointSlice that somebody has written by hand, with one pod; without a name, it is an address."""
    target = {"targetRef": {"name": pod, "uid": uid}} if pod else {}
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service, "app": service}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [HOST], **target}],
        "ports": [{"name": "http", "port": fake.port}],
    }


@asynccontextmanager
async def discovering(
    *wanted: PodSource,
    goldens: Mapping[str, GoldenAnswer] = NO_GOLDENS,
    removal_seconds: float = 1.0,
    registry: Registry | None = None,
) -> AsyncIterator[Scene]:
    """Run a fake cluster, and a discovery of the service in it."""
    registry = Registry() if registry is None else registry
    async with running_cluster() as cluster, Probe() as probe:
        access = ClusterAccess(cluster.url, token_file=cluster.token_file)
        discovery = Discovery(
            registry, probe, lambda: access, every_seconds=0.02, removal_seconds=removal_seconds, pauses=QUICK
        )
        scene = Scene(cluster, registry, discovery)
        async with discovery:
            with registry.observed(scene.note):
                await discovery.add(wanted or sources(), goldens)
                yield scene
