"""Polls replicas that other programs run, configured by `url` or found: ready while healthy, failed otherwise.

A quality floor holds only if the address serves the variant it should. If the variant's directory is available, its
golden prompt is sent before the replica becomes ready. What a change of a replica does, by its entry:

==========  ============================  =================================  =======================================
call        it is not ready               ready, the same server and         ready, another server or variant
                                          variant
==========  ============================  =================================  =======================================
`add`       verified, then ready          ready while it is verified again   verified, then ready
`prepare`   verified, then ready          ready while it is verified again   ready; the successor is verified beside
                                                                             it, and takes over at `keep_only`
==========  ============================  =================================  =======================================
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from config.golden import GoldenAnswer
from serving.errors import ReplicaConflict
from serving.poller import Poller
from serving.probe import Probe
from serving.registry import Registry, ReplicaSource
from serving.replica import CONFIGURATION, Replica, State


@dataclass(frozen=True, slots=True)
class _Poll:
    """A poller, and the task that runs it."""

    poller: Poller
    task: asyncio.Task[None]

    @property
    def replica(self) -> Replica:
        """The replica as configured."""
        return self.poller.replica


@dataclass(slots=True)
class Watch:
    """Polls external replicas while the `async with` block runs, and updates their entries in the registry.

    `replicas` are those at the start. `goldens` are the expected answers by variant. `owner` is the source of the
    entries. `successors` has the replicas that are prepared, in a registry that no request sees.
    """

    replicas: tuple[Replica, ...]
    registry: Registry
    probe: Probe
    goldens: Mapping[str, GoldenAnswer] = field(default_factory=dict)
    every_seconds: float = 1.0
    owner: str = CONFIGURATION
    successors: Registry = field(init=False, default_factory=Registry)
    _source: ReplicaSource = field(init=False)
    _polls: dict[str, _Poll] = field(default_factory=dict)
    _prepared: dict[str, _Poll] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._source = self.registry.source(self.owner)

    async def __aenter__(self) -> Self:
        """Start polling every replica; none is ready before it has answered. Raises ReplicaConflict."""
        try:
            self.add(self.replicas)
        except ReplicaConflict:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop polling."""
        await self._stop()

    def add(self, replicas: tuple[Replica, ...]) -> None:
        """Start polling the replicas that are new or have changed.

        Raises ReplicaConflict if another source owns an id; the replicas after it in the tuple are not added.
        """
        for replica in replicas:
            self._end_preparation(replica.id)
            poll = self._polls.get(replica.id)
            if poll is not None and poll.replica == replica:
                continue
            if not (self._is_ready(replica.id) and poll is not None and _same_server(poll.replica, replica)):
                self._source.put(replica, State.STARTING, "not reached yet")
            self._end_poll(replica.id)
            self._polls[replica.id] = self._poll(replica, self.registry)

    def prepare(self, replicas: tuple[Replica, ...]) -> None:
        """Like `add`, but a ready replica stays until `keep_only` if its successor is another server or variant."""
        for replica in replicas:
            poll, prepared = self._polls.get(replica.id), self._prepared.get(replica.id)
            stays = poll is not None and self._is_ready(replica.id) and not _same_server(poll.replica, replica)
            if not stays:
                self.add((replica,))
            elif prepared is None or prepared.replica != replica:
                self._end_preparation(replica.id)
                self.successors.source(self.owner).put(replica, State.STARTING, "not reached yet")
                self._prepared[replica.id] = self._poll(replica, self.successors)

    def hold(self, replica: Replica, state: State, reason: str) -> None:
        """Stop polling a replica; its entry stays, in this state. ReplicaConflict if another source owns its id."""
        self._end_preparation(replica.id)
        poll = self._end_poll(replica.id)
        if poll is not None and poll.replica == replica:
            self._source.move(replica.id, state, reason)  # keeps what the last check has seen of it
        else:
            self._source.put(replica, state, reason)

    def remove(self, replica_id: str) -> None:
        """Stop polling a replica, and remove it from the registry."""
        self._end_preparation(replica_id)
        self._end_poll(replica_id)
        self._source.remove(replica_id)

    def keep_only(self, replicas: tuple[Replica, ...]) -> None:
        """Let successors take over, and remove all others from the registry; replicas of other sources stay."""
        wanted = {replica.id for replica in replicas}
        for replica_id in self._polls.keys() - wanted:
            self._end_preparation(replica_id)
            self._end_poll(replica_id)
        self._source.keep_only(wanted)
        self.switch()

    def switch(self) -> None:
        """Let the successors that are prepared take over, as ready as they are."""
        for replica_id, poll in [*self._prepared.items()]:
            status = self.successors.status(replica_id)
            self._end_preparation(replica_id)
            self._source.put(status.replica, status.state, status.reason)
            self._end_poll(replica_id)
            self._polls[replica_id] = self._poll(poll.replica, self.registry)

    def leaving(self, replicas: tuple[Replica, ...]) -> set[str]:
        """Return the ids of replicas that `keep_only` would replace or remove."""
        return (self._polls.keys() - {replica.id for replica in replicas}) | self._prepared.keys()

    async def _stop(self) -> None:
        tasks = [poll.task for poll in (*self._polls.values(), *self._prepared.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _is_ready(self, replica_id: str) -> bool:
        return replica_id in self.registry and self.registry.status(replica_id).state is State.READY

    def _poll(self, replica: Replica, registry: Registry) -> _Poll:
        poller = Poller(
            replica, registry, self.owner, self.probe, lambda: self.goldens.get(replica.variant), self.every_seconds
        )
        return _Poll(poller, asyncio.create_task(poller.run(), name=f"watch {replica.id}"))

    def _end_poll(self, replica_id: str) -> _Poll | None:
        poll = self._polls.pop(replica_id, None)
        if poll is not None:
            poll.task.cancel()
        return poll

    def _end_preparation(self, replica_id: str) -> None:
        poll = self._prepared.pop(replica_id, None)
        if poll is not None:
            poll.task.cancel()
            self.successors.source(self.owner).remove(replica_id)


def _same_server(one: Replica, other: Replica) -> bool:
    return (one.url, one.variant) == (other.url, other.variant)
