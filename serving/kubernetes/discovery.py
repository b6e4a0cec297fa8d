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

A pod that several entries have found belongs to the first of them. While the configuration changes, from `add` to
`keep_only`, ready pods stay what they are; see `Watch.prepare`.

While the API server is away nothing changes. A list without any pod, where some were ready, is not believed: those are
`unlisted` until their polls fail, or they are listed again.
"""

import asyncio
import logging
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
from serving.kubernetes.endpoints import Slices, difference
from serving.kubernetes.entry import Entry, SourceStatus
from serving.kubernetes.reflector import PAUSES, Reflector
from serving.kubernetes.sources import FoundPod, PodSource, endpoint_slices, merged
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
class _Removal:
    """A pod that is gone, and the task that removes its replica."""

    found: FoundPod
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
    _entries: dict[tuple[str | None, str], Entry] = field(default_factory=dict)
    _wanted: tuple[tuple[str | None, str], ...] = ()  # the keys of entries, in the order of the configuration
    _is_changing: bool = False  # between `add` and `keep_only`
    _found: Mapping[str, FoundPod] = field(default_factory=dict)
    _ambiguous: tuple[str, ...] = ()
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
        return tuple(entry.status for entry in self._entries.values())

    async def add(self, sources: tuple[PodSource, ...], goldens: Mapping[str, GoldenAnswer]) -> None:
        """Follow sources that are new, and prepare what has changed; `keep_only` completes the change.

        A ready pod stays as it is until then if its variant or port is another one. OptionError: there is no access to
        a cluster, and nothing has changed.
        """
        if sources and self._api is None:
            self._api = await self._stack.enter_async_context(KubernetesApi(self.access()))
        self._watch.goldens = goldens
        self._wanted, self._is_changing = tuple([source.key for source in sources]), bool(self._entries)
        for source in sources:
            entry = self._entries.get(source.key)
            if entry is None:
                self._follow(source)
            elif entry.source != source:
                entry.change(source)
        self._update()

    def keep_only(self, sources: tuple[PodSource, ...]) -> None:
        """Complete a change: what is prepared takes over, and other sources are not followed; their pods drain.

        A source is followed until those that remain for its variant have been listed.
        """
        self._wanted, self._is_changing = tuple([source.key for source in sources]), False
        self._watch.switch()
        for entry in self._entries.values():
            entry.complete_change()
        self._end_others()
        self._update()

    @property
    def successors(self) -> Registry:
        """The replicas that `keep_only` puts in place of others, in a registry that no request sees."""
        return self._watch.successors

    def leaving(self) -> set[str]:
        """Return the ids of replicas that `keep_only` replaces or removes."""
        sources = [entry.source for key, entry in self._entries.items() if key in self._wanted]
        unwanted = {name for name, found in self._found.items() if found.source not in sources}
        return unwanted | {each.replica.id for each in self.successors.snapshot()}

    def away(self) -> str | None:
        """Return why the API server can't be read, and since when; None if all slices can be."""
        outages = [entry.reflector.outage for entry in self._entries.values() if entry.reflector.outage]
        return str(min(outages, key=lambda each: each.since_at)) if outages else None

    def _follow(self, source: PodSource) -> None:
        assert self._api is not None
        own = self._api.access.namespace
        namespace = source.namespace or own

        def on_slices(slices: Slices, from_list: bool) -> None:
            self._take(entry, slices, from_list=from_list)

        reflector = Reflector(self._api, endpoint_slices(namespace), source.selector, on_slices, self.pauses)
        task = asyncio.create_task(reflector.run(), name=f"follow {source.selector} in {namespace}")
        entry = self._entries[source.key] = Entry(source, None if namespace == own else namespace, reflector, task)

    def _end_others(self) -> None:
        """End the entries that are not wanted, unless it is not known yet which pods of their variant remain."""
        awaited = {
            entry.source.pod.variant
            for key, entry in self._entries.items()
            if key in self._wanted and not entry.is_listed
        }
        for key, entry in [*self._entries.items()]:
            if key not in self._wanted and entry.source.pod.variant not in awaited:
                del self._entries[key]
                entry.task.cancel()

    def _take(self, entry: Entry, slices: Slices, *, from_list: bool) -> None:
        entry.take(slices, from_list=from_list)
        if not self._is_changing:
            self._end_others()
        self._update()

    def _update(self) -> None:
        """Bring the registry to what the entries have found together; those of the new configuration come first."""
        entries = [self._entries[key] for key in sorted(self._entries, key=self._precedence)]
        pictures = [*((each.source, each.pods) for each in entries), *(each.replaced for each in entries)]
        # Before the registry changes: its observers may come back here.
        before, (self._found, ambiguous) = self._found, merged(pictures)
        self._log_ambiguities(ambiguous)
        changes = difference(before, self._found)
        for found in changes.changed:
            removal = self._removals.pop(found.pod.id, None)
            if removal is not None:
                removal.task.cancel()
            predecessor = removal.found if removal else before.get(found.pod.id)
            if predecessor is not None and predecessor.pod.uid != found.pod.uid:
                self._watch.remove(found.pod.id)  # another pod of the same name
            is_other_entry = predecessor is not None and predecessor.source != found.source
            self._put(found, prepare=self._is_changing and is_other_entry)
        for found in changes.gone:
            self._begin_removal(found)

    def _precedence(self, key: tuple[str | None, str]) -> int:
        return self._wanted.index(key) if key in self._wanted else len(self._wanted)

    def _log_ambiguities(self, ambiguous: tuple[str, ...]) -> None:
        """Log what is new; while the configuration changes, two entries may have the same pods for a moment."""
        if self._is_changing:
            return
        for what in ambiguous:
            if what not in self._ambiguous:
                log.warning("%s", what)
        self._ambiguous = ambiguous

    def _put(self, found: FoundPod, *, prepare: bool) -> None:
        """Bring the registry's entry of a pod to what Kubernetes says; a pod that another source has is left to it."""
        replica, pod = found.replica, found.pod
        try:
            if pod.standing == "ready":
                (self._watch.prepare if prepare else self._watch.add)((replica,))
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

    def _begin_removal(self, found: FoundPod) -> None:
        if found.pod.id in self._conflicts:
            self._conflicts.discard(found.pod.id)
            return
        if found.pod.id in self._removals:
            return
        task = asyncio.create_task(self._remove(found), name=f"remove {found.pod.id}")
        self._removals[found.pod.id] = _Removal(found, task)

    async def _remove(self, found: FoundPod) -> None:
        await asyncio.sleep(self.removal_seconds if found.pod.standing == "ready" else 0.0)
        self._watch.hold(found.replica, State.DRAINING, "its pod is gone")
        with suppress(TimeoutError):
            async with asyncio.timeout(IDLE_SECONDS):
                await self.registry.idle(found.pod.id)
        self._watch.remove(found.pod.id)
        del self._removals[found.pod.id]

    def _drop_unlisted(self) -> None:
        """Remove the pods that an empty list lacks as soon as they do not answer."""
        doubted = [entry for entry in self._entries.values() if entry.is_doubted]
        if not doubted:
            return
        failed = {each.replica.id for each in self.registry.snapshot() if each.state is State.FAILED}
        for entry in doubted:
            entry.drop(failed)
        self._update()
