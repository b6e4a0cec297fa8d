"""Samples of counters, and the rates between them."""

import pytest

from gateway.observability.metrics import Metrics
from gateway.status.recent_errors import RecentErrors
from gateway.status.traffic import (
    HISTORY_SECONDS,
    INTERVAL_SECONDS,
    Totals,
    TrafficHistory,
    TrafficSample,
    is_failure,
    point_between,
    totals_of,
    traffic_status,
)
from gateway.status.values import RateStatus

HI, LO, NONE = ("smol", "hi", "bf16"), ("smol", "lo", "int4"), ("smol", "none", "none")


@pytest.mark.parametrize(
    "code, failed",
    [("200", 0), ("400", 0), ("404", 0), ("499", 0), ("429", 1), ("500", 1), ("503", 1), ("upstream_disconnected", 1)],
)
def test_what_counts_as_failed(code: str, failed: int) -> None:
    """Errors that are not the client's: overload, the gateway's and the replicas', and streams that broke."""
    assert is_failure(code) == bool(failed)


def test_totals_of_the_counters() -> None:
    """Codes, endpoints and reasons are added up; reasoning tokens are completion tokens already; zeros are left out."""
    metrics = Metrics()
    metrics.outcome(HI, "chat.completions", "200", "preferred").inc(3)
    metrics.outcome(HI, "completions", "502", "preferred").inc(2)
    metrics.outcome(NONE, "completions", "429", "none").inc()
    metrics.outcome(LO, "completions", "200", "spill").inc(0)
    for kind, tokens in (("prompt", 10), ("completion", 20), ("reasoning", 5)):
        metrics.tokens.labels(*HI, kind).inc(tokens)
    assert totals_of(metrics.requests.children, metrics.tokens.children) == {
        HI: Totals(5, 2, 10, 20),
        NONE: Totals(1, 1),
    }


def test_rates_between_two_samples() -> None:
    """Answered requests and tokens by precision; failures of all of them together, a refused request among them."""
    before = TrafficSample(100.0, 3.0, {HI: Totals(10, 0, 100, 200)})
    after = TrafficSample(110.0, 13.0, {HI: Totals(20, 2, 150, 400), LO: Totals(5, 0, 10, 30), NONE: Totals(3, 3)})
    point = point_between(before, after)
    assert (point.at, point.seconds, point.failed_per_second) == (110.0, 10.0, 0.5)
    assert point.precisions == {"bf16": RateStatus(0.8, 5.0, 20.0), "int4": RateStatus(0.5, 1.0, 3.0)}


def test_an_hour_is_kept_by_minutes() -> None:
    """However many samples are taken, the hour has 60 intervals, and the interval that runs is the last point."""
    history = TrafficHistory(Metrics(), wall_clock=lambda: 20_000.0, clock=lambda: 20_000.0)
    for number in range(3990):
        history.add(TrafficSample(5.0 * number, 5.0 * number, {HI: Totals(5.0 * number)}))
    status = traffic_status(history.history, history.recent)
    assert len(history.history) == HISTORY_SECONDS / INTERVAL_SECONDS + 1
    assert len(history.recent) == 62
    assert {point.seconds for point in status.points[:-1]} == {60.0}
    assert {point.precisions["bf16"].requests_per_second for point in status.points[:-1]} == {1.0}
    assert status.points[-1].at == 20_000.0


@pytest.mark.parametrize("jump", [-7200.0, 7200.0])
def test_the_wall_clock_is_set(jump: float) -> None:
    """Rates and intervals are those of the monotonic clock; only the times that are shown jump."""
    history = TrafficHistory(Metrics(), wall_clock=lambda: 4000.0 + jump, clock=lambda: 300.0)
    for second in range(0, 300, 5):
        shown = 4000.0 if second < 100 else 4000.0 + jump
        history.add(TrafficSample(shown, float(second), {HI: Totals(2.0 * second)}))
    points = traffic_status(history.history, history.recent[:-1]).points
    assert [point.seconds for point in points] == [60.0] * 5
    assert {point.precisions["bf16"].requests_per_second for point in points} == {2.0}
    assert points[-1].at == 4000.0 + jump
    assert history.current().monotonic_seconds == 300.0


def test_no_traffic_yet() -> None:
    """A gateway that has just started has no rate."""
    assert traffic_status((), ()).points == ()
    assert traffic_status((), ()).recent is None


def test_errors_of_a_kind_are_counted() -> None:
    """The latest of each alias, code and replica is kept, newest first; a flood pushes out no other kind."""
    errors = RecentErrors(limit=2, wall_clock=lambda: 7.0)
    errors.add("smol", "502", "hi-1", "req-1", "it broke")
    for number in range(100):
        errors.add("smol", "429", "none", f"req-{number + 2}", "x" * 1000)
    latest = errors.latest()
    assert [(each.code, each.count, each.request_id) for each in latest] == [
        ("429", 100, "req-101"),
        ("502", 1, "req-1"),
    ]
    assert len(latest[0].message) == 300
    errors.add("smol", "503", "none", "req-9", "")
    assert [each.code for each in errors.latest()] == ["503", "429"]
