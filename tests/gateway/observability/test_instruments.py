"""Accumulators count as prometheus_client's own do, and no label can make them grow without end."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from gateway.observability.metrics.instruments import EXEMPLAR_CHARACTERS, OTHER, Instruments

BOUNDS = (0.1, 0.5, 1.0, 2.5)


def registered() -> tuple[Instruments, CollectorRegistry]:
    """Instruments, and a registry that reads them."""
    made, registry = Instruments(), CollectorRegistry(auto_describe=True)
    registry.register(made)
    return made, registry


@given(st.lists(st.one_of(st.sampled_from(BOUNDS), st.floats(-1, 10))))
def test_buckets_are_those_of_prometheus_client(values: list[float]) -> None:
    """The same values make the same lines, at the edges, too."""
    made, ours = registered()
    theirs = CollectorRegistry()
    own = made.histogram("x_seconds", "X.", BOUNDS, "alias").labels("a")
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
    """Each bucket keeps its last request, when and how much; an id that is too long for OpenMetrics is left out."""
    made, registry = registered()
    own = made.histogram("x_seconds", "X.", BOUNDS).labels()
    for value, request_id, at in ((0.3, "r-1", 10.0), (0.4, "r-2", 11.5), (99.0, "r" * EXEMPLAR_CHARACTERS, 12.0)):
        own.observe_with_exemplar(value, request_id, at)
    own.observe_with_exemplar(0.05, "r" * (EXEMPLAR_CHARACTERS + 1), 13.0)
    encode, _ = choose_encoder("application/openmetrics-text; version=1.0.0")
    (family,) = text_string_to_metric_families(encode(registry).decode())  # type: ignore[no-untyped-call]
    told = {
        sample.labels["le"]: (
            sample.exemplar.labels["request_id"],
            sample.exemplar.value,
            float(sample.exemplar.timestamp or 0),
        )
        for sample in family.samples
        if sample.exemplar
    }
    assert told == {"0.5": ("r-2", 0.4, 11.5), "+Inf": ("r" * EXEMPLAR_CHARACTERS, 99.0, 12.0)}
    assert sum(own.counts) == 4


@pytest.mark.parametrize(
    "make",
    [
        lambda made: made.counter("x", "X.", "alias", "code", most=3),
        lambda made: made.gauge("x", "X.", "alias", "code", most=3),
        lambda made: made.histogram("x", "X.", BOUNDS, "alias", "code", most=3),
    ],
    ids=["counter", "gauge", "histogram"],
)
def test_no_more_children_than_that(make: Callable[[Instruments], Any]) -> None:
    """What comes beyond the bound is counted together, and what was there before stays apart."""
    made, registry = registered()
    family = make(made)
    children = [family.labels(f"a{number}", "200") for number in range(10)]
    assert len(set(map(id, children))) == 4
    assert family.labels("a2", "200") is children[2]
    assert family.labels("one more", "200") is family.labels(OTHER, OTHER) is children[9]
    (metric,) = registry.collect()
    seen = {tuple(sample.labels[name] for name in ("alias", "code")) for sample in metric.samples}
    assert seen == {("a0", "200"), ("a1", "200"), ("a2", "200"), (OTHER, OTHER)}


def test_a_level_falls_by_what_it_rose() -> None:
    """One is counted while the block runs, whatever ends it."""
    made, _ = registered()
    level = made.gauge("x", "X.").labels()
    with pytest.raises(ZeroDivisionError), level:
        with level:
            assert level.value == 2
        _ = 1 / 0
    assert level.value == 0
