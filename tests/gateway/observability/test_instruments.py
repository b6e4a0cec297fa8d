"""Instruments count as prometheus_client's do, and the number of children is bounded."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from gateway.observability.metrics.instruments import EXEMPLAR_CHARACTERS, OTHER, InstrumentCollector
from gateway.observability.metrics.spec import MetricSpec, MetricType

BOUNDS = (0.1, 0.5, 1.0, 2.5)
HISTOGRAM = MetricSpec("quantgate_x_seconds", "histogram", ("alias",), "X.", BOUNDS)
NO_LABELS = MetricSpec("quantgate_x_seconds", "histogram", (), "X.", BOUNDS)


def registered() -> tuple[InstrumentCollector, CollectorRegistry]:
    """A collector of instruments, and a registry that it is registered with."""
    instruments, registry = InstrumentCollector(), CollectorRegistry(auto_describe=True)
    registry.register(instruments)
    return instruments, registry


@given(st.lists(st.one_of(st.sampled_from(BOUNDS), st.floats(-1, 10))))
def test_buckets_are_those_of_prometheus_client(values: list[float]) -> None:
    """The same observations give the same samples, values at a bucket's bound included."""
    instruments, ours = registered()
    theirs = CollectorRegistry()
    own = instruments.histogram(HISTOGRAM).labels("a")
    other = Histogram("quantgate_x_seconds", "X.", ("alias",), registry=theirs, buckets=BOUNDS).labels("a")
    for value in values:
        own.observe(value)
        other.observe(value)

    def samples(registry: CollectorRegistry) -> dict[tuple[str, str | None], float]:
        return {
            (sample.name, sample.labels.get("le")): sample.value
            for family in registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    assert samples(ours) == pytest.approx(samples(theirs))


def test_exemplars() -> None:
    """Each bucket keeps its latest request id, value and time; an id that is too long for OpenMetrics is left out."""
    instruments, registry = registered()
    own = instruments.histogram(NO_LABELS).labels()
    for value, request_id, at in ((0.3, "r-1", 10.0), (0.4, "r-2", 11.5), (99.0, "r" * EXEMPLAR_CHARACTERS, 12.0)):
        own.observe_with_exemplar(value, request_id, at)
    own.observe_with_exemplar(0.05, "r" * (EXEMPLAR_CHARACTERS + 1), 13.0)
    encode, _ = choose_encoder("application/openmetrics-text; version=1.0.0")
    (family,) = text_string_to_metric_families(encode(registry).decode())  # type: ignore[no-untyped-call]
    exemplars = {
        sample.labels["le"]: (
            sample.exemplar.labels["request_id"],
            sample.exemplar.value,
            float(sample.exemplar.timestamp or 0),
        )
        for sample in family.samples
        if sample.exemplar
    }
    assert exemplars == {"0.5": ("r-2", 0.4, 11.5), "+Inf": ("r" * EXEMPLAR_CHARACTERS, 99.0, 12.0)}
    assert sum(own.counts) == 4


@pytest.mark.parametrize("kind", ["counter", "gauge", "histogram"])
def test_the_number_of_children_is_limited(kind: MetricType) -> None:
    """Label values beyond the limit share one child; earlier children stay separate."""
    instruments, registry = registered()
    spec = MetricSpec("quantgate_x", kind, ("alias", "code"), "X.", BOUNDS)
    create: Callable[..., Any] = getattr(instruments, kind)
    family = create(spec, max_children=3)
    children = [family.labels(f"a{number}", "200") for number in range(10)]
    assert len(set(map(id, children))) == 4
    assert family.labels("a2", "200") is children[2]
    assert family.labels("one more", "200") is family.labels(OTHER, OTHER) is children[9]
    (metric,) = registry.collect()
    labels = {tuple(sample.labels[name] for name in ("alias", "code")) for sample in metric.samples}
    assert labels == {("a0", "200"), ("a1", "200"), ("a2", "200"), (OTHER, OTHER)}


def test_a_gauge_returns_to_its_value() -> None:
    """As a context manager a gauge is higher by one while the block runs, also if the block raises."""
    instruments, _ = registered()
    gauge = instruments.gauge(MetricSpec("quantgate_x", "gauge", (), "X.")).labels()
    with pytest.raises(ZeroDivisionError), gauge:
        with gauge:
            assert gauge.value == 2
        _ = 1 / 0
    assert gauge.value == 0
