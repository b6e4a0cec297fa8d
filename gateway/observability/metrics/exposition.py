"""What a scrape gets: Prometheus' text format, or OpenMetrics (with exemplars) for whoever asks for it."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class Exposition:
    """A body and its content type."""

    body: bytes
    content_type: str


@dataclass(frozen=True, slots=True, eq=False)
class _Collected(Collector):
    metrics: tuple[Metric, ...]

    def collect(self) -> Iterable[Metric]:
        return self.metrics


async def exposition(registry: CollectorRegistry, accept: str) -> Exposition:
    """Write everything in the form that an `accept` header asks for."""
    encode, content_type = choose_encoder(accept)
    # Reading is quick and takes the loop's own view. Writing 10,000 lines takes a tenth of a second, too long for
    # streams to stand still: they go on between the thread's turns.
    collected = _Collected(tuple(registry.collect()))
    return Exposition(await asyncio.to_thread(encode, collected), content_type)
