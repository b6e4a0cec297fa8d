"""What defines a metric: the type of the rows of `table.py`."""

from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

MetricType = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """Name, type, label names, help and buckets of one metric.

    `name` is the one that queries use: a counter's ends in `_total`, a histogram's series add `_bucket`, `_count` and
    `_sum`. `buckets` are the inclusive upper bounds of a histogram, ascending, without +Inf.
    """

    name: str
    type: MetricType
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()

    def counter_family(self) -> CounterMetricFamily:
        """Create an empty counter family; prometheus_client removes `_total` from its name and adds it to samples."""
        assert self.type == "counter"
        return CounterMetricFamily(self.name, self.help, labels=self.labels)

    def gauge_family(self) -> GaugeMetricFamily:
        """Create an empty gauge family."""
        assert self.type == "gauge"
        return GaugeMetricFamily(self.name, self.help, labels=self.labels)

    def histogram_family(self) -> HistogramMetricFamily:
        """Create an empty histogram family."""
        assert self.type == "histogram"
        return HistogramMetricFamily(self.name, self.help, labels=self.labels)
