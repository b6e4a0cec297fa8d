"""Keeps the registry's replicas as the EndpointSlices of Kubernetes list them.

What a pod's entry in the registry is, by what Kubernetes says of it:

=====================  ==========================================================================================
pod                    replica
=====================  ==========================================================================================
ready                  polled and verified like one with a `url` (serving/watch.py): starting, ready or failed
not ready              starting, without polls
terminating            draining
gone                   as before for `removal_seconds`, in case another slice lists it; then draining until it is
                       idle, then removed
=====================  ==========================================================================================

While the API server is away nothing changes. A list without any pod, where some were ready, is not believed: those are
`unlisted` until their polls fail, or they are listed again.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from config.golden import GoldenAnswer
from serving.backoff import Backoff
from serving.errors import ReplicaConflict
from serving.kubernetes.access import ClusterAccess
from serving.kubernetes.api import KubernetesApi
from serving.kubernetes.endpoints import (
    PodEndpoint,
    Slices,
    Standing,
    difference,
    is_doubtful,
    pod_endpoints,
    port_problem,
)
from serving.kubernetes.reflector import PAUSES, Counts, Outage, Reflector
from serving.kubernetes.sources import PodSource, endpoint_slices
from serving.probe import Probe
from serving.registry import Registry
from serving.replica import KUBERNETES, State
from serving.watch import Watch

log = logging.getLogger(__name__)

# A controller that puts endpoints into other slices may delete the old ones first.
REMOVAL_SECONDS = 1.0
# A pod that is gone has ended its connections; an entry that is not idle by then is removed all the same.
IDLE_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """What is known of one entry: whether its slices can be read, what was seen, and its pods by standing.

    `unlisted` is the number of pods that stay although an empty list lacks them, `problem` why some can't be used.
    """

    source: PodSource
    outage: Outage | None
    counts: Counts
    pods: Counter[Standing]
    unlisted: int
    problem: str | None


@dataclass(slots=True)
class _Entry:
    """An entry of the configuration while its slices are followed."""

    source: PodSource
    reflector: Reflector
    task: asyncio.Task[None]
    slices: Slices = field(default_factory=dict)
    pods: Mapping[str, PodEndpoint] = field(default_factory=dict)
    unlisted: Mapping[str, PodEndpoint] = field(default_factory=dict)  # some of `pods`
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class _Removal:
    """A pod that is gone, and the task that removes its replica."""

    pod: PodEndpoint
    task: asyncio.Task[None]


@dataclass(slots=True)
class Discovery:
    """Follows the pods of `PodSource`s while the `async with` block runs; it owns their entries in the registry.

    `access` is called when there is a first source; OptionError if there is no access to a cluster.
    """

    registry: Registry
    probe: Probe
    access: Callable[[], ClusterAccess]
    every_seconds: float = 1.0
    removal_seconds: float = REMOVAL_SECONDS
    pauses: Backoff = PAUSES
    _watch: Watch = field(init=False)
    _api: KubernetesApi | None = None
    _entries: dict[tuple[str | None, str], _Entry] = field(default_factory=dict)
    _removals: dict[str, _Removal] = field(default_factory=dict)
    _conflicts: set[str] = field(default_factory=set)
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    def __post_init__(self) -> None:
        self._watch = Watch((), self.registry, self.probe, every_seconds=self.every_seconds, owner=KUBERNETES)

    async def __aenter__(self) -> Self:
        """Follow nothing yet; see `add`."""
        await self._stack.enter_async_context(self._watch)
        self._stack.enter_context(self.registry.observed(self._drop_unlisted))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop following; the entries of the registry stay as they are."""
        tasks = [entry.task for entry in self._entries.values()] + [each.task for each in self._removals.values()]
        self._entries.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stack.aclose()

    @property
    def statuses(self) -> tuple[SourceStatus, ...]:
        """What is known of each entry."""
        return tuple(_status(entry) for entry in self._entries.values())

    async def add(self, sources: tuple[PodSource, ...], goldens: Mapping[str, GoldenAnswer]) -> None:
        """Follow sources that are new, and verify the pods of changed ones again.

        OptionError: there is no access to a cluster, and nothing has changed.
        """
        if sources and self._api is None:
            self._api = await self._stack.enter_async_context(KubernetesApi(self.access()))
        self._watch.goldens = goldens
        for source in sources:
            entry = self._entries.get(source.key)
            if entry is None:
                self._follow(source)
            elif entry.source != source:
                self._change(entry, source)

    def keep_only(self, sources: tuple[PodSource, ...]) -> None:
        """Stop following all others; their pods drain."""
        wanted = {source.key for source in sources}
        for key in self._entries.keys() - wanted:
            entry = self._entries.pop(key)
            entry.task.cancel()
            for pod in entry.pods.values():
                self._begin_removal(entry.source, pod, grace_seconds=0.0)

    def away(self) -> str | None:
        """Return why the API server can't be read, and since when; None if all slices can be."""
        outages = [entry.reflector.outage for entry in self._entries.values() if entry.reflector.outage]
        return str(min(outages, key=lambda each: each.since_at)) if outages else None

    def _follow(self, source: PodSource) -> None:
        assert self._api is not None
        namespace = source.namespace or self._api.access.namespace

        def on_slices(slices: Slices, from_list: bool) -> None:
            self._take(entry, slices, from_list=from_list)

        reflector = Reflector(self._api, endpoint_slices(namespace), source.selector, on_slices, self.pauses)
        task = asyncio.create_task(reflector.run(), name=f"follow {source.selector} in {namespace}")
        entry = self._entries[source.key] = _Entry(source, reflector, task)

    def _change(self, entry: _Entry, source: PodSource) -> None:
        """Look at the same slices with another port, variant or other options."""
        before, entry.pods, entry.source = entry.pods, {}, source
        self._update(entry, {**entry.unlisted, **self._listed(entry)})
        for pod in before.values():
            if pod.id not in entry.pods:
                self._begin_removal(source, pod, grace_seconds=0.0)

    def _take(self, entry: _Entry, slices: Slices, *, from_list: bool) -> None:
        """Follow a new picture of the slices; an empty list is no reason to remove pods that answer."""
        entry.slices = slices
        now = self._listed(entry)
        entry.unlisted = {replica_id: pod for replica_id, pod in entry.unlisted.items() if replica_id not in now}
        if from_list and is_doubtful(entry.pods, now):
            entry.unlisted = {replica_id: pod for replica_id, pod in entry.pods.items() if pod.standing == "ready"}
            log.warning(
                "the list of EndpointSlices with %s is empty; %d pods stay until they do not answer any more",
                entry.source.selector,
                len(entry.unlisted),
            )
        self._update(entry, {**entry.unlisted, **now})

    def _listed(self, entry: _Entry) -> Mapping[str, PodEndpoint]:
        """Return the pods of the slices; if the port of some is not clear, that is logged once."""
        source, problem = entry.source, port_problem(entry.slices, entry.source.port)
        if problem is not None and problem != entry.problem:
            log.warning("pods of %s: %s", source.pod.variant, problem)
        entry.problem = problem
        return pod_endpoints(entry.slices, source.port, source.pod.variant)

    def _update(self, entry: _Entry, now: Mapping[str, PodEndpoint]) -> None:
        # Before the registry changes: its observers may come back here.
        before, entry.pods = entry.pods, now
        changes = difference(before, now)
        for pod in changes.changed:
            removal = self._removals.pop(pod.id, None)
            if removal is not None:
                removal.task.cancel()
            predecessor = removal.pod if removal else before.get(pod.id)
            if predecessor is not None and predecessor.uid != pod.uid:
                self._watch.remove(pod.id)  # another pod of the same name
            self._put(entry.source, pod)
        for pod in changes.gone:
            self._begin_removal(entry.source, pod, self.removal_seconds if pod.standing == "ready" else 0.0)

    def _put(self, source: PodSource, pod: PodEndpoint) -> None:
        """Bring the registry's entry of a pod to what Kubernetes says; a pod that another source has is left to it."""
        replica = source.replica(pod)
        try:
            if pod.standing == "ready":
                self._watch.add((replica,))
            elif pod.standing == "terminating":
                self._watch.hold(replica, State.DRAINING, "its pod is terminating")
            else:
                self._watch.hold(replica, State.STARTING, "its pod is not ready")
        except ReplicaConflict as conflict:
            if pod.id not in self._conflicts:
                log.warning("%s", conflict)
            self._conflicts.add(pod.id)
        else:
            self._conflicts.discard(pod.id)

    def _begin_removal(self, source: PodSource, pod: PodEndpoint, grace_seconds: float) -> None:
        if pod.id in self._conflicts:
            self._conflicts.discard(pod.id)
            return
        if pod.id in self._removals:
            return
        task = asyncio.create_task(self._remove(source, pod, grace_seconds), name=f"remove {pod.id}")
        self._removals[pod.id] = _Removal(pod, task)

    async def _remove(self, source: PodSource, pod: PodEndpoint, grace_seconds: float) -> None:
        await asyncio.sleep(grace_seconds)
        self._watch.hold(source.replica(pod), State.DRAINING, "its pod is gone")
        with suppress(TimeoutError):
            async with asyncio.timeout(IDLE_SECONDS):
                await self.registry.idle(pod.id)
        self._watch.remove(pod.id)
        del self._removals[pod.id]

    def _drop_unlisted(self) -> None:
        """Remove the pods that an empty list lacks as soon as they do not answer."""
        doubted = [entry for entry in self._entries.values() if entry.unlisted]
        if not doubted:
            return
        failed = {each.replica.id for each in self.registry.snapshot() if each.state is State.FAILED}
        for entry in doubted:
            entry.unlisted = {name: pod for name, pod in entry.unlisted.items() if name not in failed}
            self._update(entry, {**entry.unlisted, **self._listed(entry)})


def _status(entry: _Entry) -> SourceStatus:
    pods = Counter(pod.standing for name, pod in entry.pods.items() if name not in entry.unlisted)
    reflector = entry.reflector
    return SourceStatus(entry.source, reflector.outage, reflector.counts, pods, len(entry.unlisted), entry.problem)
