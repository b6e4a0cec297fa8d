"""What a routing policy is here: it is asked where a turn goes, and told what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway.proxy.load.polling import PollIntervals
from gateway.routing.engine_metrics import EngineMetrics
from tests.benchmarks.routing.workloads import Turn

NOBODY: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Refused:
    """A 429, and what its Retry-After says."""

    retry_after_seconds: float


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer says at its end."""

    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int


Decision = str | Refused


class MetricsReader(Protocol):
    """Polls the metrics of every replica, as often as it likes."""

    intervals: PollIntervals

    def busy(self, replica: str) -> bool:
        """Tell whether a replica is polled often."""

    def polled(self, replica: str, poll: EngineMetrics) -> None:
        """The replica's metrics were read."""

    def unanswered(self, replica: str, now: float) -> None:
        """The replica's metrics could not be read."""


class Policy(Protocol):
    """Decides; times are seconds of the simulated clock.

    What a policy may know of a turn is what a gateway sees of a request. A replica in `tried` has just failed it.
    """

    name: str

    async def choose(self, turn: Turn, now: float, tried: frozenset[str] = NOBODY) -> Decision:
        """Say which replica answers, or that none does; may keep the turn waiting."""

    def would_take(self, turn: Turn, now: float) -> bool:
        """Tell whether a turn that was refused would be sent somewhere now; changes nothing."""

    def sent(self, turn: Turn, replica: str, now: float) -> None:
        """A turn was sent there, in the very step in which it was chosen."""

    def first_token(self, turn: Turn, replica: str, now: float) -> None:
        """Its answer has begun."""

    def finished(self, turn: Turn, replica: str, usage: Usage, now: float) -> None:
        """Its answer is complete."""

    def failed(self, turn: Turn, replica: str, now: float) -> None:
        """The replica failed it."""

    def readers(self) -> Sequence[MetricsReader]:
        """Who polls: each of them by itself."""

    def ready(self, replicas: Sequence[str], now: float) -> None:
        """These replicas pass their health checks from now on, and no others."""

    def switches(self) -> Sequence[float]:
        """When the alias itself changed the rung that it prefers; nothing where a policy has no such state."""
