"""Counters, gauges and histograms for the data path.

prometheus_client provides the registry and the encoders of both text formats; the instruments that are updated per
token are reimplemented here, because they need no locks: one event loop updates and collects them. prometheus_client's
`labels(...).inc()` takes 1.0 us, `labels(...).observe(...)` 1.4 us and with an exemplar 2.3 us (locks, and a bucket
search in Python); the equivalents here take 0.10, 0.19 and 0.36 us.
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

from gateway.observability.metrics.spec import MetricSpec

OTHER = "_other"  # every label value of the child that is shared beyond a family's limit
MAX_CHILDREN = 8000
MAX_HISTOGRAMS = 400

# OpenMetrics limits the label names and values of an exemplar to 128 characters together.
EXEMPLAR_LABEL = "request_id"
EXEMPLAR_CHARACTERS = 128 - len(EXEMPLAR_LABEL)


@dataclass(slots=True, eq=False)
class Counter:
    """A value that only increases."""

    value: float = 0.0

    def inc(self, amount: float = 1.0) -> None:
        """Add a non-negative amount."""
        self.value += amount


@dataclass(slots=True, eq=False)
class Gauge:
    """A value that increases and decreases; as a context manager it is higher by one while the block runs."""

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
    """Counts observations by bucket; `bounds` are inclusive upper bounds, a last bucket (+Inf) is added."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    sum: float = 0.0
    # By bucket index, its latest observation: request id, value, time in seconds since 1970.
    exemplars: dict[int, tuple[str, float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_with_exemplar(self, value: float, request_id: str, at_seconds: float) -> None:
        """Count a value and store it as its bucket's exemplar; `at_seconds` is since 1970.

        A request id that is too long for OpenMetrics is not exposed.
        """
        bucket = bisect_left(self.bounds, value)
        self.counts[bucket] += 1
        self.sum += value
        self.exemplars[bucket] = request_id, value, at_seconds


Child = TypeVar("Child", Counter, Gauge, Histogram)


@dataclass(slots=True, eq=False)
class Family(Generic[Child]):
    """One metric: a child per combination of label values; beyond `max_children`, one shared child labelled OTHER."""

    label_names: tuple[str, ...]
    create: Callable[[], Child]
    max_children: int
    children: dict[tuple[str, ...], Child] = field(default_factory=dict)

    def labels(self, *values: str) -> Child:
        """Return the child of these label values, in the order of `label_names`; create it at first use."""
        return self.children.get(values) or self._create_child(values)

    def exists(self, *values: str) -> None:
        """Create the child of these label values at 0.

        Only half of the limit is used for that: the other half is for label values that occur.
        """
        if len(self.children) < self.max_children // 2:
            self.labels(*values)

    def remove(self, label: str, value: str) -> None:
        """Remove the children with a label value that will not occur again."""
        position = self.label_names.index(label)
        for values in [values for values in self.children if values[position] == value]:
            del self.children[values]

    def _create_child(self, values: tuple[str, ...]) -> Child:
        assert len(values) == len(self.label_names)
        key = values if len(self.children) < self.max_children else (OTHER,) * len(values)
        return self.children.setdefault(key, self.create())


@dataclass(slots=True, eq=False)
class InstrumentCollector(Collector):
    """Creates families from their specifications, and exposes them to the registry that it is registered with."""

    _families: list[Callable[[], Metric]] = field(default_factory=list)

    def counter(self, spec: MetricSpec, max_children: int = MAX_CHILDREN) -> Family[Counter]:
        """Create a family of counters."""
        family = Family(spec.labels, Counter, max_children)
        self._families.append(lambda: _with_values(spec.counter_family(), family))
        return family

    def gauge(self, spec: MetricSpec, max_children: int = MAX_CHILDREN) -> Family[Gauge]:
        """Create a family of gauges."""
        family = Family(spec.labels, Gauge, max_children)
        self._families.append(lambda: _with_values(spec.gauge_family(), family))
        return family

    def histogram(self, spec: MetricSpec, max_children: int = MAX_HISTOGRAMS) -> Family[Histogram]:
        """Create a family of histograms with the buckets of `spec`."""
        family = Family(spec.labels, lambda: Histogram(spec.buckets), max_children)
        bounds = [*map(floatToGoString, spec.buckets), "+Inf"]
        self._families.append(lambda: _with_buckets(spec.histogram_family(), family, bounds))
        return family

    def collect(self) -> Iterator[Metric]:
        """Yield every family with its current values; called once per scrape."""
        for family in self._families:
            yield family()


def _with_values(
    metric: CounterMetricFamily | GaugeMetricFamily, family: Family[Counter] | Family[Gauge]
) -> CounterMetricFamily | GaugeMetricFamily:
    for labels, child in family.children.items():
        metric.add_metric(labels, child.value)
    return metric


def _with_buckets(metric: HistogramMetricFamily, family: Family[Histogram], bounds: list[str]) -> HistogramMetricFamily:
    for labels, child in family.children.items():
        metric.add_metric(labels, list(_cumulative_buckets(child, bounds)), child.sum)
    return metric


def _cumulative_buckets(
    child: Histogram, bounds: Iterable[str]
) -> Iterator[tuple[str, float] | tuple[str, float, Exemplar]]:
    """Yield upper bound, cumulative count and exemplar of each bucket, as HistogramMetricFamily expects them."""
    total = 0
    for index, (bound, count) in enumerate(zip(bounds, child.counts, strict=True)):
        total += count
        exemplar = child.exemplars.get(index)
        if exemplar is not None and len(exemplar[0]) <= EXEMPLAR_CHARACTERS:
            request_id, value, at_seconds = exemplar
            yield bound, total, Exemplar({EXEMPLAR_LABEL: request_id}, value, at_seconds)
        else:
            yield bound, total
