"""What other routers do, each as its authors describe it; none of them knows what a precision is worth.

Each looks at requests in flight, at the beginning of prompts, or at the engines' metrics. Health is known to all.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.proxy.load.polling import DEFAULT_INTERVALS
from gateway.routing.engine_metrics import EngineMetrics
from tests.benchmarks.routing.policy import NOBODY, Decision, MetricsReader, Refused, Usage
from tests.benchmarks.routing.profiles import Fleet
from tests.benchmarks.routing.workloads import Turn

NOT_READY = Refused(1.0)


class Counting:
    """What all of them share: who is ready, and how much is in flight where."""

    name = "counting"
    intervals = DEFAULT_INTERVALS

    def __init__(self, fleet: Fleet, seed: int = 1) -> None:
        self.fleet = fleet
        self.in_flight = Counter[str]()
        self._ready = tuple(member.id for member in fleet.members)
        self._chance = random.Random(seed)

    async def choose(self, turn: Turn, now: float, tried: frozenset[str] = NOBODY) -> Decision:
        """Pick among those that are ready."""
        open_to = [replica for replica in self._ready if replica not in tried]
        return self._pick(turn, open_to, now) if open_to else NOT_READY

    def would_take(self, turn: Turn, now: float) -> bool:
        return bool(self._ready)

    def _pick(self, turn: Turn, open_to: Sequence[str], now: float) -> str:
        raise NotImplementedError

    def _least(self, open_to: Sequence[str]) -> str:
        return min(open_to, key=self.in_flight.__getitem__)

    def sent(self, turn: Turn, replica: str, now: float) -> None:
        self.in_flight[replica] += 1

    def first_token(self, turn: Turn, replica: str, now: float) -> None:
        pass

    def finished(self, turn: Turn, replica: str, usage: Usage, now: float) -> None:
        self.in_flight[replica] -= 1

    def failed(self, turn: Turn, replica: str, now: float) -> None:
        self.in_flight[replica] -= 1

    def polled(self, replica: str, poll: EngineMetrics) -> None:
        pass

    def unanswered(self, replica: str, now: float) -> None:
        pass

    def busy(self, replica: str) -> bool:
        return self.in_flight[replica] > 0

    def readers(self) -> Sequence[MetricsReader]:
        return (self,)

    def ready(self, replicas: Sequence[str], now: float) -> None:
        self._ready = tuple(replicas)

    def switches(self) -> Sequence[float]:
        return ()


class RoundRobin(Counting):
    """Each in turn."""

    name = "round robin"

    def __init__(self, fleet: Fleet, seed: int = 1) -> None:
        super().__init__(fleet, seed)
        self._turn = 0

    def _pick(self, turn: Turn, open_to: Sequence[str], now: float) -> str:
        return open_to[self._turn % len(open_to)]

    def sent(self, turn: Turn, replica: str, now: float) -> None:
        super().sent(turn, replica, now)
        self._turn += 1


class Random(Counting):
    """Any."""

    name = "random"

    def _pick(self, turn: Turn, open_to: Sequence[str], now: float) -> str:
        return self._chance.choice(open_to)


class LeastInFlight(Counting):
    """The one with the fewest requests."""

    name = "least in flight"

    def _pick(self, turn: Turn, open_to: Sequence[str], now: float) -> str:
        return self._least(open_to)


class PowerOfTwo(Counting):
    """The less loaded of two that chance names; loads are the router's own counts, which is as fresh as can be."""

    name = "power of two"

    def _pick(self, turn: Turn, open_to: Sequence[str], now: float) -> str:
        return self._least(self._chance.sample(open_to, min(2, len(open_to))))


class CacheAware(Counting):
    """vllm-router's and SMG's cache_aware: who has read most of the prompt, unless the load is too uneven.

    Their trees hold characters, this one blocks of tokens. A prompt of which less than the threshold is known goes to
    the least loaded.
    """

    name = "cache aware"
    threshold, apart, times = 0.3, 64, 1.5

    def __init__(self, fleet: Fleet, seed: int = 1) -> None:
        super().__init__(fleet, seed)
        self._readers: dict[int, dict[str, None]] = {}  # of each block, the latest last

    def _pick(self, turn: Turn, open_to: Sequence[str], now: float) -> str:
        loads = [self.in_flight[replica] for replica in open_to]
        if max(loads) - min(loads) > self.apart and max(loads) > min(loads) * self.times:
            return self._least(open_to)
        matched, readers = 0, dict[str, None]()
        for block in turn.prompt_blocks:
            found = self._readers.get(block)
            if found is None:
                break
            matched, readers = matched + 1, found
        if matched > self.threshold * len(turn.prompt_blocks):
            latest = next((replica for replica in reversed(readers) if replica in open_to), None)
            if latest is not None:
                return latest
        return self._least(open_to)

    def sent(self, turn: Turn, replica: str, now: float) -> None:
        super().sent(turn, replica, now)
        for block in turn.prompt_blocks:
            readers = self._readers.setdefault(block, {})
            readers.pop(replica, None)
            readers[replica] = None


@dataclass(slots=True)
class _Known:
    """What LeastLoad knows of a replica since its last look at it."""

    at_seconds: float
    waiting: float
    kv_usage: float
    sent_tokens: int = 0


class LeastLoad(Counting):
    """SMG's least_load: seconds of work ahead, and a barrier that grows as KV fills.

    (queued tokens + tokens sent since the poll) / throughput + 0.15 s * k / (1 - k), with its defaults: a poll every
    10 s, 2,000 tokens/s, and 1,024 tokens for a queued request of which an HTTP engine tells no tokens.
    """

    name = "least load"
    every_seconds, per_second, mean_prompt_tokens, barrier_seconds = 10.0, 2000.0, 1024, 0.15

    def __init__(self, fleet: Fleet, seed: int = 1) -> None:
        super().__init__(fleet, seed)
        self._known: dict[str, _Known] = {}

    def _pick(self, turn: Turn, open_to: Sequence[str], now: float) -> str:
        if not all(replica in self._known for replica in open_to):
            return self._least(open_to)
        return min(open_to, key=self._seconds)

    def _seconds(self, replica: str) -> float:
        known = self._known[replica]
        tokens = known.waiting * self.mean_prompt_tokens + known.sent_tokens
        full = min(known.kv_usage, 0.99)
        return tokens / self.per_second + self.barrier_seconds * full / (1 - full)

    def sent(self, turn: Turn, replica: str, now: float) -> None:
        super().sent(turn, replica, now)
        if replica in self._known:
            self._known[replica].sent_tokens += turn.prompt_tokens

    def polled(self, replica: str, poll: EngineMetrics) -> None:
        known = self._known.get(replica)
        if known is None or poll.at_seconds - known.at_seconds >= self.every_seconds * 0.95:
            # A metric that isn't there reads as zero, as in theirs.
            self._known[replica] = _Known(poll.at_seconds, poll.waiting or 0.0, poll.kv_usage or 0.0)


class StaticLadder(Counting):
    """llama-swap's spillover: the best precision takes so many requests at once, then the next; the last one the rest.

    It knows the order of the rungs, and not how they fare. `slots` are for each replica, by precision.
    """

    name = "static ladder"

    def __init__(self, fleet: Fleet, seed: int = 1, *, slots: Mapping[str, int] | None = None) -> None:
        super().__init__(fleet, seed)
        self._places = slots or {}

    def _pick(self, turn: Turn, open_to: Sequence[str], now: float) -> str:
        for rung in self.fleet.rungs:
            here = [member.id for member in self.fleet.members if member.precision == rung and member.id in open_to]
            if here and self.in_flight[self._least(here)] < self._places.get(rung, 16):
                return self._least(here)
        return self._least(open_to)
