"""What is booked for a request, by a clock that a test moves."""

from dataclasses import dataclass, field

import pytest

from config.variant import QualityMeasures, Variant
from gateway.observability.access_log import AccessRecord
from gateway.observability.metrics import Metrics
from gateway.observability.trace_context import Headers
from gateway.openai.usage import CompletionDetails, Usage
from gateway.proxy.stats import RequestStats
from gateway.routing.pick import Choice, Reason
from serving.replica import Replica


class Clock:
    """Shows what a test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def choice(name: str = "hi", reason: Reason = "preferred") -> Choice:
    """A replica of a variant."""
    variant = Variant(name, "bf16", QualityMeasures("unknown"))
    return Choice(Replica(f"{name}-1", name, "bf16", "http://x", "m1"), variant, reason)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """One sample."""
    return metrics.registry.get_sample_value(f"quantgate_{name}", labels)


SERVED = {"alias": "smol", "variant": "hi", "precision": "bf16"}


def unheard(entry: AccessRecord, at_seconds: float) -> None:
    """Who hears of it is not what a test is about."""


def test_a_stream() -> None:
    """Times are counted from the request, tokens from what the engine reports, and one line tells it all."""
    metrics, clock = Metrics(), Clock()
    told: list[tuple[AccessRecord, float]] = []
    account = RequestStats(metrics, lambda *line: told.append(line), "chat.completions", "r-1", clock, lambda: 1e9)
    with account:
        assert value(metrics, "requests_in_flight", endpoint="chat.completions") == 1
        account.alias = "smol"
        clock.now += 2
        account.queued_seconds = 2
        account.chose(choice())
        clock.now += 0.25
        account.sent()
        for seconds in (1.0, 0.5, 0.5):
            clock.now += seconds
            account.token()
        account.usage = Usage(10, 3, CompletionDetails(1))
        account.caller, account.finish = "team-a", "stop"
        account.code = "200"
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
    entry = AccessRecord(
        request_id="r-1",
        key="team-a",
        endpoint="chat.completions",
        alias="smol",
        variant="hi",
        precision="bf16",
        replica="hi-1",
        reason="preferred",
        code="200",
        attempts=1,
        queued_seconds=2.0,
        first_token_seconds=3.25,
        seconds=5.25,
        prompt_tokens=10,
        completion_tokens=3,
        estimated=False,
        finish="stop",
    )
    assert told == [(entry, 1e9)]


def test_a_retry() -> None:
    """What is booked goes to who answered last; overhead is counted for the first attempt only."""
    metrics, clock = Metrics(), Clock()
    with RequestStats(metrics, unheard, "completions", "r-2", clock) as account:
        account.alias = "smol"
        account.chose(choice("hi"))
        account.sent()
        account.retried("overloaded")
        account.chose(choice("lo", "fallback"))
        clock.now += 1
        account.sent()
        account.code = "200"
    assert value(metrics, "retries_total", alias="smol", code="overloaded") == 1
    served = {"alias": "smol", "variant": "lo", "precision": "bf16"}
    outcome = {"endpoint": "completions", "code": "200", "reason": "fallback"}
    assert value(metrics, "requests_total", **served, **outcome) == 1
    assert value(metrics, "overhead_seconds_count") == 1
    assert account.attempts == 2


def test_nobody_answered() -> None:
    """A request that found no replica is booked for its alias, with the time it waited."""
    metrics, clock = Metrics(), Clock()
    with RequestStats(metrics, unheard, "completions", "r-3", clock) as account:
        account.alias = "smol"
        account.queued_seconds = 30.0
        account.code = "503"
    nobody = {"alias": "smol", "variant": "none", "precision": "none", "reason": "none"}
    assert value(metrics, "requests_total", **nobody, endpoint="completions", code="503") == 1
    assert value(metrics, "queue_seconds_sum", alias="smol") == 30.0
    assert value(metrics, "request_seconds_count", alias="smol", variant="none", precision="none") is None


def test_a_defect_is_booked_too() -> None:
    """Whatever ends the block, the request is counted once and no longer in flight."""
    metrics = Metrics()
    with pytest.raises(ZeroDivisionError), RequestStats(metrics, unheard, "completions", "r-4"):
        _ = 1 / 0
    nobody = {"alias": "_unknown", "variant": "none", "precision": "none", "reason": "none"}
    assert value(metrics, "requests_total", **nobody, endpoint="completions", code="500") == 1
    assert value(metrics, "requests_in_flight", endpoint="completions") == 0
    assert value(metrics, "queue_seconds_count", alias="_unknown") is None


def test_usage_that_is_null() -> None:
    """Counts that the engine leaves open are zero."""
    metrics = Metrics()
    with RequestStats(metrics, unheard, "completions", "r-5") as account:
        account.alias = "smol"
        account.chose(choice())
        account.usage = Usage(None, None, CompletionDetails(None))
    assert value(metrics, "tokens_total", **SERVED, kind="completion") == 0


@dataclass(slots=True)
class KeptTrace:
    """Keeps what it is told."""

    headers: Headers = ()
    ended: list[AccessRecord] = field(default_factory=list)

    def end(self, entry: AccessRecord) -> None:
        """Keep it."""
        self.ended.append(entry)


def test_log_and_trace_are_told_the_same() -> None:
    """Both get the one entry, at the end."""
    told, trace = list[AccessRecord](), KeptTrace()
    with RequestStats(Metrics(), lambda entry, _: told.append(entry), "completions", "r-7", trace=trace):
        assert not trace.ended
    assert trace.ended == told
    assert len(told) == 1


def test_a_stream_cut_short() -> None:
    """Without the engine's own count, what came is counted; a word that no engine has for an end goes no further."""
    metrics, told = Metrics(), list[AccessRecord]()
    with RequestStats(metrics, lambda entry, _: told.append(entry), "completions", "r-6") as account:
        account.alias = "smol"
        account.chose(choice())
        account.sent()
        for _ in range(4):
            account.token()
        account.code, account.finish = "499", "made\nup"
    tokens = [value(metrics, "tokens_total", **SERVED, kind=kind) for kind in ("prompt", "completion")]
    assert tokens == [0, 4]
    (entry,) = told
    assert (entry.prompt_tokens, entry.completion_tokens, entry.estimated) == (0, 4, True)
    assert (entry.code, entry.finish) == ("499", "other")


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
    """An answer that never began is no short one."""
    with RequestStats(Metrics(), unheard, "completions", "r-8") as account:
        account.chose(choice())
        for _ in range(events):
            account.token()
        account.usage = usage
        assert account.lengths(streams=streams) == lengths
