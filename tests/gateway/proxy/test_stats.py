"""The statistics of one request, on a clock that a test moves."""

from dataclasses import dataclass, field

import pytest
from msgspec import structs

from config.variant import QualityMeasures, Variant
from gateway.observability.access_log import AccessRecord
from gateway.observability.metrics import Metrics
from gateway.observability.trace_context import Headers
from gateway.openai.usage import CompletionDetails, Usage
from gateway.proxy.stats import RequestStats
from gateway.routing.latency import ReplicaMetrics, estimate_latency
from gateway.routing.pick import Candidate, Reason
from serving.replica import Replica
from tests.gateway.observability.records import RECORD


class Clock:
    """Returns the time that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def candidate(name: str = "hi", reason: Reason = "preferred") -> Candidate:
    """A replica of a variant."""
    variant = Variant(name, "bf16", QualityMeasures("unknown"))
    replica = Replica(f"{name}-1", name, "bf16", "http://x", "m1")
    return Candidate(estimate_latency(ReplicaMetrics(replica)), variant, reason)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """One sample."""
    return metrics.registry.get_sample_value(f"quantgate_{name}", labels)


SERVED = {"alias": "smol", "variant": "hi", "precision": "bf16"}


def ignore(record: AccessRecord, at_seconds: float) -> None:
    """Drop a line of the access log."""


def test_a_stream() -> None:
    """Times count from the arrival, tokens are the engine's, and one record has all of it."""
    metrics, clock = Metrics(), Clock()
    lines: list[tuple[AccessRecord, float]] = []
    stats = RequestStats(metrics, lambda *line: lines.append(line), "chat.completions", "r-1", clock, lambda: 1e9)
    with stats:
        assert value(metrics, "requests_in_flight", endpoint="chat.completions") == 1
        stats.alias = "smol"
        clock.now += 2
        stats.queued_seconds = 2
        stats.attempt(candidate())
        clock.now += 0.25
        stats.sent()
        for seconds in (1.0, 0.5, 0.5):
            clock.now += seconds
            stats.token()
        stats.usage = Usage(10, 3, CompletionDetails(1))
        stats.caller, stats.finish, stats.stream = "team-a", "stop", True
        stats.code = "200"
        clock.now += 1
    assert value(metrics, "requests_in_flight", endpoint="chat.completions") == 0
    outcome = {**SERVED, "endpoint": "chat.completions", "code": "200", "reason": "preferred"}
    assert value(metrics, "requests_total", **outcome) == 1
    assert value(metrics, "overhead_seconds_sum") == 0.25
    assert value(metrics, "queue_seconds_sum", alias="smol") == 2
    assert value(metrics, "time_to_first_token_seconds_sum", **SERVED) == 3.25
    assert value(metrics, "inter_token_latency_seconds_sum", **SERVED) == 1.0
    assert value(metrics, "inter_token_latency_seconds_count", **SERVED) == 2
    assert value(metrics, "request_seconds_sum", **SERVED) == 5.25
    tokens = [value(metrics, "tokens_total", **SERVED, kind=kind) for kind in ("prompt", "completion", "reasoning")]
    assert tokens == [10, 3, 1]
    record = structs.replace(RECORD, first_token_seconds=3.25, seconds=5.25)
    assert lines == [(record, 1e9)]


def test_a_retry() -> None:
    """A request is booked to the replica that was asked last; overhead counts for the first attempt only."""
    metrics, clock = Metrics(), Clock()
    with RequestStats(metrics, ignore, "completions", "r-2", clock) as stats:
        stats.alias = "smol"
        stats.attempt(candidate("hi"))
        stats.sent()
        stats.retried("overloaded")
        stats.attempt(candidate("lo", "fallback"))
        clock.now += 1
        stats.sent()
        stats.code = "200"
    assert value(metrics, "retries_total", alias="smol", code="overloaded") == 1
    served = {"alias": "smol", "variant": "lo", "precision": "bf16"}
    outcome = {"endpoint": "completions", "code": "200", "reason": "fallback"}
    assert value(metrics, "requests_total", **served, **outcome) == 1
    assert value(metrics, "overhead_seconds_count") == 1
    assert stats.attempts == 2


def test_no_replica() -> None:
    """A request that no replica saw is booked to its alias, with the time that it waited."""
    metrics, clock = Metrics(), Clock()
    with RequestStats(metrics, ignore, "completions", "r-3", clock) as stats:
        stats.alias = "smol"
        stats.queued_seconds = 30.0
        stats.code = "503"
    none = {"alias": "smol", "variant": "none", "precision": "none", "reason": "none"}
    assert value(metrics, "requests_total", **none, endpoint="completions", code="503") == 1
    assert value(metrics, "queue_seconds_sum", alias="smol") == 30.0
    assert value(metrics, "request_seconds_count", alias="smol", variant="none", precision="none") is None


def test_an_unexpected_exception() -> None:
    """Any exception ends the block with the request counted once and no longer in flight."""
    metrics = Metrics()
    with pytest.raises(ZeroDivisionError), RequestStats(metrics, ignore, "completions", "r-4"):
        _ = 1 / 0
    none = {"alias": "_unknown", "variant": "none", "precision": "none", "reason": "none"}
    assert value(metrics, "requests_total", **none, endpoint="completions", code="500") == 1
    assert value(metrics, "requests_in_flight", endpoint="completions") == 0
    assert value(metrics, "queue_seconds_count", alias="_unknown") is None


def test_usage_with_null() -> None:
    """Counts that are null in the engine's usage are zero."""
    metrics = Metrics()
    with RequestStats(metrics, ignore, "completions", "r-5") as stats:
        stats.alias = "smol"
        stats.attempt(candidate())
        stats.usage = Usage(None, None, CompletionDetails(None))
    assert value(metrics, "tokens_total", **SERVED, kind="completion") == 0


@dataclass(slots=True)
class RecordingTrace:
    """Keeps the records that it is ended with."""

    headers: Headers = ()
    ended: list[AccessRecord] = field(default_factory=list)

    def end(self, record: AccessRecord) -> None:
        """Keep the record."""
        self.ended.append(record)


def test_log_and_trace_get_the_same_record() -> None:
    """Both get one record, at the end."""
    lines, trace = list[AccessRecord](), RecordingTrace()
    with RequestStats(Metrics(), lambda record, _: lines.append(record), "completions", "r-7", trace=trace):
        assert not trace.ended
    assert trace.ended == lines
    assert len(lines) == 1


def test_a_stream_that_is_cut_short() -> None:
    """Without the engine's usage the events count as tokens; an unknown finish reason is logged as `other`."""
    metrics, lines = Metrics(), list[AccessRecord]()
    with RequestStats(metrics, lambda record, _: lines.append(record), "completions", "r-6") as stats:
        stats.alias = "smol"
        stats.attempt(candidate())
        stats.sent()
        for _ in range(4):
            stats.token()
        stats.code, stats.finish = "499", "made\nup"
    tokens = [value(metrics, "tokens_total", **SERVED, kind=kind) for kind in ("prompt", "completion")]
    assert tokens == [0, 4]
    (record,) = lines
    assert (record.prompt_tokens, record.completion_tokens, record.estimated) == (0, 4, True)
    assert (record.code, record.finish) == ("499", "other")


@pytest.mark.parametrize(
    "usage, events, streams, lengths",
    [
        (Usage(10, 3), 2, True, (10, 3)),
        (Usage(10, 0), 0, False, (10, None)),
        (None, 4, True, (0, 4)),
        (None, 0, True, (0, None)),  # refused, or never reached
        (None, 0, False, (0, None)),
    ],
)
def test_lengths(usage: Usage | None, events: int, streams: bool, lengths: tuple[int, int | None]) -> None:
    """An answer that never began has no length, which is not a short one."""
    with RequestStats(Metrics(), ignore, "completions", "r-8") as stats:
        stats.attempt(candidate())
        for _ in range(events):
            stats.token()
        stats.usage = usage
        assert stats.lengths(streams=streams) == lengths


@pytest.mark.parametrize("complete, code", [(False, "499"), (True, "200")])
def test_a_client_that_disconnects(complete: bool, code: str) -> None:
    """A client that leaves after the whole of a stream was written has missed nothing."""
    lines = list[AccessRecord]()
    with RequestStats(Metrics(), lambda record, _: lines.append(record), "completions", "r-9") as stats:
        stats.complete = complete
        stats.client_disconnected()
    assert [record.code for record in lines] == [code]
