"""Accumulators that cost next to nothing to feed, and the families that Prometheus gets of them.

prometheus_client stays the registry and the writer of both text formats. Only what is fed for every token is ours: its
`labels(...).inc()` takes 1.0 us, `labels(...).observe(...)` 1.4 us and with an exemplar 2.3 us (locks, and buckets
searched in Python); the same here takes 0.10, 0.19 and 0.36 us. Nothing is locked: one event loop feeds and reads it.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Self, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

PREFIX = "quantgate_"
OTHER = "_other"  # every label of what comes beyond a family's most children
MAX_CHILDREN = 8000
MAX_HISTOGRAMS = 400

# OpenMetrics allows an exemplar 128 characters, its label's name included.
EXEMPLAR_LABEL = "request_id"
EXEMPLAR_CHARACTERS = 128 - len(EXEMPLAR_LABEL)


@dataclass(slots=True, eq=False)
class Counter:
    """Goes up."""

    value: float = 0.0

    def inc(self, amount: float = 1.0) -> None:
        """Add."""
        self.value += amount


@dataclass(slots=True, eq=False)
class Gauge:
    """Goes up and down; as a context manager it counts one while the block runs."""

    value: float = 0.0

    def __enter__(self) -> Self:
        self.value += 1.0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.value -= 1.0


@dataclass(slots=True, eq=False)
class Histogram:
    """Counts values by bucket; `bounds` are upper ends, included, and one more bucket takes what is above the last."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    sum: float = 0.0
    # By bucket, the last request of each: who, how much, when.
    exemplars: dict[int, tuple[str, float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_with_exemplar(self, value: float, exemplar: str, at_seconds: float) -> None:
        """Count a value, and keep whose it was and when, in seconds since 1970."""
        place = bisect_left(self.bounds, value)
        self.counts[place] += 1
        self.sum += value
        if len(exemplar) <= EXEMPLAR_CHARACTERS:
            self.exemplars[place] = (exemplar, value, at_seconds)


Child = TypeVar("Child", Counter, Gauge, Histogram)


@dataclass(slots=True, eq=False)
class Family(Generic[Child]):
    """One metric: a child for each combination of label values, up to `most`; all others share one."""

    names: tuple[str, ...]
    make: Callable[[], Child]
    most: int
    children: dict[tuple[str, ...], Child] = field(default_factory=dict)

    def labels(self, *values: str) -> Child:
        """The child of these label values."""
        return self.children.get(values) or self._made(values)

    def _made(self, values: tuple[str, ...]) -> Child:
        assert len(values) == len(self.names)
        key = values if len(self.children) < self.most else (OTHER,) * len(values)
        return self.children.setdefault(key, self.make())


@dataclass(slots=True, eq=False)
class Instruments(Collector):
    """Makes families, and tells Prometheus what is in them."""

    _exposed: list[Callable[[], Metric]] = field(default_factory=list)

    def counter(self, name: str, text: str, *labels: str, most: int = MAX_CHILDREN) -> Family[Counter]:
        """A family of counters; `_total` is added to the name, and ours before it as with every kind."""
        family = Family(labels, Counter, most)
        self._exposed.append(lambda: _simple(CounterMetricFamily(PREFIX + name, text, labels=labels), family))
        return family

    def gauge(self, name: str, text: str, *labels: str, most: int = MAX_CHILDREN) -> Family[Gauge]:
        """A family of levels."""
        family = Family(labels, Gauge, most)
        self._exposed.append(lambda: _simple(GaugeMetricFamily(PREFIX + name, text, labels=labels), family))
        return family

    def histogram(
        self, name: str, text: str, bounds: tuple[float, ...], *labels: str, most: int = MAX_HISTOGRAMS
    ) -> Family[Histogram]:
        """A family of distributions."""
        family = Family(labels, lambda: Histogram(bounds), most)
        edges = [*map(floatToGoString, bounds), "+Inf"]
        self._exposed.append(lambda: _buckets(HistogramMetricFamily(PREFIX + name, text, labels=labels), family, edges))
        return family

    def collect(self) -> Iterator[Metric]:
        """Yield every family as it is now."""
        for exposed in self._exposed:
            yield exposed()


def _simple(
    metric: CounterMetricFamily | GaugeMetricFamily, family: Family[Counter] | Family[Gauge]
) -> CounterMetricFamily | GaugeMetricFamily:
    for labels, child in family.children.items():
        metric.add_metric(labels, child.value)
    return metric


def _buckets(metric: HistogramMetricFamily, family: Family[Histogram], edges: list[str]) -> HistogramMetricFamily:
    for labels, child in family.children.items():
        metric.add_metric(labels, list(_cumulated(child, edges)), child.sum)
    return metric


def _cumulated(child: Histogram, edges: Iterable[str]) -> Iterator[tuple[str, float] | tuple[str, float, Exemplar]]:
    below = 0
    for place, (edge, count) in enumerate(zip(edges, child.counts, strict=True)):
        below += count
        if kept := child.exemplars.get(place):
            exemplar, value, at_seconds = kept
            yield edge, below, Exemplar({EXEMPLAR_LABEL: exemplar}, value, at_seconds)
        else:
            yield edge, below
