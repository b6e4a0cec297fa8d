"""How much a key may ask: buckets that refill, requests that run, and what is told."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import RateLimited
from gateway.keys import ANONYMOUS, Caller
from gateway.quota import Bucket, Counts, Quota, concurrency_share, format_duration, with_rate

STEPS = st.lists(st.tuples(st.floats(0, 90), st.integers(0, 5)), max_size=60)
RATES = st.integers(1, 100)
BEGINNINGS = st.floats(-1e6, 1e9)


@contextmanager
def running(quota: Quota, caller: Caller, now_seconds: float) -> Iterator[Counts | None]:
    """One request while the block runs: its head arrives, it is admitted, and it ends."""
    request = quota.start(caller)
    try:
        yield quota.admit(caller, now_seconds)
    finally:
        if request is not None:
            request.release()


def asked(quota: Quota, caller: Caller, now_seconds: float, tokens: int = 0) -> None:
    """One request that ends at once."""
    with running(quota, caller, now_seconds) as counts:
        charge(counts, tokens, now_seconds)


def charge(counts: Counts | None, tokens: int, now_seconds: float) -> None:
    """Charge the tokens of a request, if its key has limits."""
    if counts is not None:
        counts.charge(tokens, now_seconds)


def refusal(quota: Quota, caller: Caller, now_seconds: float) -> RateLimited:
    """What a request is told that may not be."""
    with pytest.raises(RateLimited) as caught, running(quota, caller, now_seconds):
        pytest.fail("it was admitted")
    return caught.value


@given(RATES, BEGINNINGS, STEPS, st.sampled_from([1.0, 0.5, 0.25, 1 / 3]))
def test_no_more_requests_than_the_rate_admits(
    per_minute: int, now: float, steps: list[tuple[float, int]], share: float
) -> None:
    """Over any time at most a full bucket and what it was refilled by, and who waits as told is let in."""
    quota, caller, admitted, begun = Quota(share), Caller("a", requests_per_minute=per_minute), 0, now
    for pause_seconds, requests in steps:
        now += pause_seconds
        for _ in range(requests):
            with suppress(RateLimited):
                asked(quota, caller, now)
                admitted += 1
        rate = per_minute * share
        assert admitted <= max(rate, 1) + rate * (now - begun + 1e-5) / 60
    with suppress(RateLimited):
        asked(quota, caller, now)
        return
    asked(quota, caller, now + refusal(quota, caller, now).retry_after_seconds)


@given(RATES, BEGINNINGS, STEPS)
def test_no_more_tokens_than_the_rate_admits(per_minute: int, now: float, steps: list[tuple[float, int]]) -> None:
    """Nobody is admitted unless all that was spent before has been refilled, up to the bucket's size."""
    quota, caller, spent, begun = Quota(), Caller("a", tokens_per_minute=per_minute), 0, now
    for pause_seconds, tokens in steps:
        now += pause_seconds
        with suppress(RateLimited):
            with running(quota, caller, now):
                assert spent < per_minute * (1 + (now - begun + 1e-5) / 60)
            with running(quota, caller, now) as counts:
                charge(counts, tokens * 50, now)
                spent += tokens * 50


@given(st.lists(st.sampled_from(["enter", "leave", "fail"]), max_size=80), st.integers(1, 5))
def test_requests_at_once(storm: list[str], concurrency: int) -> None:
    """Never more than may run, never fewer than none, and none once all have ended, however they did."""
    quota, caller, requests = Quota(), Caller("a", concurrency=concurrency), list[ExitStack]()
    asked(quota, caller, 0)
    for what in storm:
        if what == "enter":
            stack = ExitStack()
            try:
                stack.enter_context(running(quota, caller, 0))
                requests.append(stack)
            except RateLimited:
                assert len(requests) == concurrency
        elif requests:
            stack = requests.pop(0)
            if what == "leave":
                stack.close()
            else:
                with pytest.raises(ZeroDivisionError), stack:
                    raise ZeroDivisionError
        assert len(requests) <= concurrency
        assert repr(quota) == f"<Quota [a: {len(requests)} running]>"
    for stack in requests:
        stack.close()
    assert repr(quota) == "<Quota [a: 0 running]>"


@given(BEGINNINGS, RATES, RATES, st.integers(0, 1000))
def test_a_bucket_keeps_what_was_taken_when_its_rate_changes(now: float, before: int, after: int, taken: int) -> None:
    """A higher limit makes a debt shorter, not longer."""
    bucket = with_rate(Bucket(before).without(taken, now), after, now)
    assert bucket is not None
    assert bucket.remaining(now) == pytest.approx(after - taken, abs=1e-3)
    assert with_rate(bucket, after, now) is bucket
    assert with_rate(bucket, None, now) is None


@pytest.mark.parametrize("amount", [1, 60])
def test_a_bucket_refills(amount: int) -> None:
    """What was taken is back after its share of a minute, and a full bucket gets no fuller."""
    bucket = Bucket(60)
    assert (bucket.remaining(5), bucket.seconds_until(60, 5), bucket.seconds_until(61, 5)) == (60, 0, 1)
    bucket = bucket.without(amount, 5)
    assert (bucket.remaining(5), bucket.seconds_until_full(5)) == (60 - amount, amount)
    assert (bucket.remaining(5 + amount / 2), bucket.remaining(5 + amount)) == (60 - amount / 2, 60)
    assert bucket.remaining(math.inf) == 60


def test_requests_a_minute() -> None:
    """A minute's worth may come at once; then the refusal tells which limit, and when the next one may come."""
    quota, caller = Quota(), Caller("alice", requests_per_minute=3)
    for _ in range(3):
        asked(quota, caller, 1000)
    error = refusal(quota, caller, 1001)
    assert (error.status, error.code, error.type) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert error.message == (
        "the key 'alice' has reached its limit of 3 requests per minute (requests_per_minute); "
        "retry in 19s, or ask the operator to raise the limit"
    )
    assert [*error.headers(), *quota.headers(caller, 1001)] == [
        (b"retry-after", b"19"),
        (b"x-should-retry", b"true"),
        (b"x-ratelimit-limit-requests", b"3"),
        (b"x-ratelimit-remaining-requests", b"0"),
        (b"x-ratelimit-reset-requests", b"59s"),
    ]
    asked(quota, caller, 1020)
    refusal(quota, caller, 1021)
    asked(quota, Caller("bob", requests_per_minute=3), 1021)


def test_tokens_a_minute() -> None:
    """An answer is paid when it is known; the debt keeps the next ones waiting."""
    quota, caller = Quota(), Caller("alice", tokens_per_minute=600)
    with running(quota, caller, 0) as counts, running(quota, caller, 0):
        # Before its charge, the answer's own headers count it.
        pending = quota.headers(caller, 0, pending_tokens=250)
        assert pending[1:] == [(b"x-ratelimit-remaining-tokens", b"350"), (b"x-ratelimit-reset-tokens", b"25s")]
        charge(counts, 700, 0)
        assert quota.headers(caller, 0) == [
            (b"x-ratelimit-limit-tokens", b"600"),
            (b"x-ratelimit-remaining-tokens", b"0"),
            (b"x-ratelimit-reset-tokens", b"1m10s"),
        ]
    error = refusal(quota, caller, 0)
    assert "limit of 600 tokens per minute (tokens_per_minute); retry in 11s" in error.message
    assert error.retry_after_seconds == pytest.approx(10, abs=0.01)
    refusal(quota, caller, 9.9)
    asked(quota, caller, 10.1)


def test_requests_running() -> None:
    """One too many is refused until another one ends, and costs nothing of the other limits."""
    quota, caller = Quota(), Caller("alice", concurrency=1, requests_per_minute=2)
    with running(quota, caller, 0):
        error = refusal(quota, caller, 0)
        assert "limit of 1 concurrent requests (concurrency); retry in 1s" in error.message
        assert dict(quota.headers(caller, 0))[b"x-ratelimit-remaining-requests"] == b"1"
        assert repr(quota) == "<Quota [alice: 1 running]>"
    asked(quota, caller, 0)


def test_callers_without_limits() -> None:
    """Nothing is counted for who has none, and nothing told."""
    quota = Quota()
    for caller in (ANONYMOUS, Caller("alice", max_tokens=5)):
        assert quota.start(caller) is None
        assert quota.admit(caller, 0) is None
        assert quota.headers(caller, 0) == []
    assert quota.headers(Caller("bob", concurrency=1), 0) == []
    assert repr(quota) == "<Quota []>"


@pytest.mark.parametrize("whole, workers, own", [(8, 4, 2), (98, 49, 2), (3, 3, 1), (3, 4, 1), (7, 4, 1), (1, 1, 1)])
def test_what_one_of_several_workers_runs_at_once(whole: int, workers: int, own: int) -> None:
    """Its share, but at least one."""
    assert concurrency_share(whole, 1 / workers) == own


def test_what_one_of_several_workers_admits() -> None:
    """Each worker has its share of a limit; a share below one still admits one, less often."""
    quota, caller = Quota(0.25), Caller("alice", requests_per_minute=2, tokens_per_minute=400)
    asked(quota, caller, 0)
    assert refusal(quota, caller, 60).retry_after_seconds == 60
    asked(quota, caller, 120)
    told = dict(quota.headers(caller, 120))
    assert (told[b"x-ratelimit-limit-requests"], told[b"x-ratelimit-reset-requests"]) == (b"1", b"2m0s")
    assert told[b"x-ratelimit-limit-tokens"] == b"100"


def test_keys_that_are_gone_are_forgotten() -> None:
    """After a reload only the keys that are left have counts, and those whose requests still run."""
    quota = Quota()
    alice, bob, carol = (Caller(name, requests_per_minute=1, concurrency=1) for name in ("alice", "bob", "carol"))
    asked(quota, alice, 0)
    with running(quota, bob, 0):
        asked(quota, carol, 0)
        quota.keep_only({"alice"})
        assert repr(quota) == "<Quota [alice: 0 running, bob: 1 running]>"
        refusal(quota, bob, 0)
    quota.keep_only(["alice"])
    assert repr(quota) == "<Quota [alice: 0 running]>"
    refusal(quota, alice, 0)


def test_limits_that_change_while_a_request_runs() -> None:
    """A reload may add, change and take away limits: what was counted stays counted, and what is paid late is free."""
    quota = Quota()
    with running(quota, Caller("alice", concurrency=1, tokens_per_minute=10_000), 0) as counts:
        charge(counts, 1000, 0)
        refusal(quota, Caller("alice", concurrency=1, requests_per_minute=1), 0)
        asked(quota, Caller("alice", concurrency=2, requests_per_minute=1), 0)
    asked(quota, Caller("alice", requests_per_minute=2), 0)
    asked(quota, Caller("alice", concurrency=1), 0)
    assert repr(quota) == "<Quota [alice: 0 running]>"


def test_a_request_is_counted_once() -> None:
    """Releasing it again changes nothing."""
    quota, caller = Quota(), Caller("alice", concurrency=2)
    first, second = quota.start(caller), quota.start(caller)
    assert first is not None
    assert second is not None
    first.release()
    first.release()
    assert repr(quota) == "<Quota [alice: 1 running]>"


@pytest.mark.parametrize(
    "debt, wait, retried", [(100, b"60", b"true"), (200, b"120", b"true"), (201, b"121", b"false")]
)
def test_retry_after_is_true(debt: int, wait: bytes, retried: bytes) -> None:
    """It is when the key may send again, never later than its reset; an SDK retries only if it would wait that long."""
    quota, caller = Quota(), Caller("alice", tokens_per_minute=100)
    asked(quota, caller, 0, tokens=99 + debt)
    error = refusal(quota, caller, 0)
    assert error.headers() == [(b"retry-after", wait), (b"x-should-retry", retried)]
    assert dict(quota.headers(caller, 0))[b"x-ratelimit-reset-tokens"] == format_duration((99 + debt) * 0.6)
    asked(quota, caller, float(wait))


@pytest.mark.parametrize(
    "seconds, written",
    [
        (0, b"0ms"),
        (0.0111, b"12ms"),
        (0.9999, b"1000ms"),
        (1, b"1s"),
        (6.2, b"7s"),
        (59.5, b"1m0s"),
        (360, b"6m0s"),
        (3661, b"1h1m1s"),
    ],
)
def test_durations(seconds: float, written: bytes) -> None:
    """Written as OpenAI does, never too short."""
    assert format_duration(seconds) == written
