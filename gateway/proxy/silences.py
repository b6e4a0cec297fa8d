"""Replicas that send nothing any more: they get no new requests, and lose those that they have.

The rules are gateway.routing.silence's; this owns their state. A replica without an entry is responsive.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from math import inf
from types import MappingProxyType
from typing import Protocol

from gateway.routing.silence import HUNG_SECONDS, PollAnswers, Silence, silence
from serving.registry import Registry
from serving.replica import Replica, State

log = logging.getLogger(__name__)

# While a replica is silent, how often it is looked at.
CHECK_SECONDS = 0.5

TEXTS: Mapping[Silence, str] = MappingProxyType(
    {
        "responsive": "replica %s answers again",
        "silent": "replica %s answers no polls and sends nothing: it gets no new requests",
        "hung": "replica %s hangs: its requests move to other replicas, its streams end with an error",
    }
)


class Exchanges(Protocol):
    """The requests that replicas are answering."""

    def heard_at(self, replica: Replica) -> float:
        """When the last byte of a response of a replica arrived (monotonic); -inf if none has."""

    def abandon(self, replica: Replica, silent_seconds: float) -> None:
        """End those exchanges with a replica that have received nothing for so long, with ReplicaHung."""


class NoExchanges:
    """Exchanges of a dispatcher that is used without a connection to any replica."""

    def heard_at(self, replica: Replica) -> float:  # noqa: ARG002 - the protocol's
        """Never."""
        return -inf

    def abandon(self, replica: Replica, silent_seconds: float) -> None:
        """Do nothing."""


class SilenceDetection:
    """Owns what is known of the silence of replicas; `on_responsive` is called when one may be asked again."""

    def __init__(
        self,
        registry: Registry,
        exchanges: Exchanges,
        clock: Callable[[], float],
        on_responsive: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._exchanges = exchanges
        self._clock = clock
        self._on_responsive = on_responsive
        self._ready: dict[str, Replica] = {}
        self._polls: dict[str, PollAnswers] = {}
        self._silent: dict[str, Silence] = {}
        self._failed: dict[
            str, Replica
        ] = {}  # by their health check, and with requests that may be running all the same
        self._timer: asyncio.TimerHandle | None = None

    @property
    def silent(self) -> Mapping[str, Silence]:
        """Replicas that are silent or hung; a live view."""
        return self._silent

    def close(self) -> None:
        """Stop looking."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def answered(self, replica_id: str) -> None:
        """A replica has answered a poll."""
        self._polls[replica_id] = PollAnswers(self._clock())
        if replica_id in self._silent:
            self._update(replica_id)

    def unanswered(self, replica_id: str) -> None:
        """A replica has not answered a poll."""
        before = self._polls.get(replica_id)
        if before is not None:
            self._polls[replica_id] = PollAnswers(before.answered_at, before.unanswered + 1)
            self._update(replica_id)
            self._watch()

    def follow_registry(self) -> None:
        """Forget replicas that are not ready any more; those whose health check failed may be hung."""
        before, self._ready = self._ready, {each.id: each for group in self._registry.ready.values() for each in group}
        for replica_id in before.keys() - self._ready.keys():
            self._left(before[replica_id])
        for replica_id in self._ready.keys() & self._failed.keys():
            del self._failed[replica_id]

    def _left(self, replica: Replica) -> None:
        polls = self._polls.pop(replica.id, PollAnswers())
        self._silent.pop(replica.id, None)
        if not self._registry.in_flight.get(replica.id) or not self._has_failed(replica.id):
            return
        heard_at = self._exchanges.heard_at(replica)
        if silence(polls, heard_at, self._clock(), healthy=False) == "hung":
            log.warning(TEXTS["hung"], replica.id)
            self._exchanges.abandon(replica, 0.0)
        else:
            # Its streams may go on; if they stop, they have to end.
            self._failed[replica.id] = replica
            self._watch()

    def _has_failed(self, replica_id: str) -> bool:
        return any(each.replica.id == replica_id and each.state is State.FAILED for each in self._registry.snapshot())

    def _update(self, replica_id: str) -> None:
        """Classify a replica anew, and act if that changed."""
        replica = self._ready.get(replica_id)
        if replica is None:
            return
        before = self._silent.get(replica_id, "responsive")
        after = silence(self._polls[replica_id], self._exchanges.heard_at(replica), self._clock())
        if after == before:
            return
        log.log(logging.INFO if after == "responsive" else logging.WARNING, TEXTS[after], replica_id)
        if after == "responsive":
            del self._silent[replica_id]
            self._on_responsive()
            return
        self._silent[replica_id] = after
        if after == "hung":
            self._exchanges.abandon(replica, 0.0)

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(CHECK_SECONDS, self._check)

    def _check(self) -> None:
        """Look at replicas that do not answer polls, and at those that have failed."""
        self._timer = None
        suspects = [replica_id for replica_id, polls in self._polls.items() if polls.unanswered]
        for replica_id in suspects:
            self._update(replica_id)
        for replica_id, replica in list(self._failed.items()):
            self._exchanges.abandon(replica, HUNG_SECONDS)
            if not self._registry.in_flight.get(replica_id):
                del self._failed[replica_id]
        if suspects or self._failed:
            self._watch()
