"""The pods that one entry of the configuration has found, as its slices say, and as they are believed."""

import asyncio
import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from serving.kubernetes.endpoints import Slices, Standing, is_doubtful, pod_endpoints, port_problem, qualified
from serving.kubernetes.reflector import Counts, Outage, Reflector
from serving.kubernetes.sources import Pods, PodSource

log = logging.getLogger(__name__)


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
class Entry:
    """An entry of the configuration while `task` follows its slices. `namespace` is None for the gateway's own.

    `replaced` are pods that have other ids since the entry has changed, with what it was before.
    """

    source: PodSource
    namespace: str | None
    reflector: Reflector
    task: asyncio.Task[None]
    is_listed: bool = False
    pods: Pods = field(default_factory=dict)
    replaced: tuple[PodSource, Pods] = field(init=False)
    _slices: Slices = field(default_factory=dict)
    _unlisted: Pods = field(default_factory=dict)  # some of `pods`
    _problem: str | None = None

    def __post_init__(self) -> None:
        self.complete_change()

    def take(self, slices: Slices, *, from_list: bool) -> None:
        """Follow a new picture of the slices; an empty list is no reason to remove pods that answer."""
        self._slices, self.is_listed = slices, True
        now = self._listed()
        self._unlisted = {replica_id: pod for replica_id, pod in self._unlisted.items() if replica_id not in now}
        if from_list and is_doubtful(self.pods, now):
            self._unlisted = {replica_id: pod for replica_id, pod in self.pods.items() if pod.standing == "ready"}
            log.warning(
                "the list of EndpointSlices with %s is empty; %d pods stay until they do not answer any more",
                self.source.selector,
                len(self._unlisted),
            )
        self.pods = {**self._unlisted, **now}

    def change(self, source: PodSource) -> None:
        """Look at the same slices with another port, variant or other options."""
        before, pods, self.source = self.source, self.pods, source
        self.pods = {**self._unlisted, **self._listed()}
        self.replaced = before, {replica_id: pod for replica_id, pod in pods.items() if replica_id not in self.pods}

    def complete_change(self) -> None:
        """Forget the pods whose ids are others since the change."""
        self.replaced = self.source, {}

    @property
    def is_doubted(self) -> bool:
        """Whether some pods stay although the last list lacks them."""
        return bool(self._unlisted)

    def drop(self, failed: Collection[str]) -> None:
        """Believe of these replicas that they are not listed."""
        self._unlisted = {name: pod for name, pod in self._unlisted.items() if name not in failed}
        self.pods = {**self._unlisted, **self._listed()}

    @property
    def status(self) -> SourceStatus:
        """What is known of it."""
        pods = Counter(pod.standing for name, pod in self.pods.items() if name not in self._unlisted)
        reflector = self.reflector
        return SourceStatus(self.source, reflector.outage, reflector.counts, pods, len(self._unlisted), self._problem)

    def _listed(self) -> Pods:
        """Return the pods of the slices; if the port of some is not clear, that is logged once."""
        source, problem = self.source, port_problem(self._slices, self.source.port)
        if problem is not None and problem != self._problem:
            log.warning("pods of %s: %s", source.pod.variant, problem)
        self._problem = problem
        pods = pod_endpoints(self._slices, source.port, source.pod.variant)
        return pods if self.namespace is None else qualified(pods, self.namespace)
