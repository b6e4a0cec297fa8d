"""The retry budget, and the reasons for which a request is not tried again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.retry import Failure, RetryBudget, earned, request_is_at_fault, retry_refusal, spent


@given(st.lists(st.booleans(), max_size=400))
def test_retries_are_a_share_of_the_traffic(events: list[bool]) -> None:
    """In any order of requests and retries, at most ten retries and a fifth of the requests are made."""
    budget, requests, retries = RetryBudget(), 0, 0
    for retry in events:
        if not retry:
            budget = earned(budget)
            requests += 1
        elif budget.suffices:
            budget = spent(budget)
            retries += 1
        assert 5 * retries <= 50 + requests
        assert 0 <= budget.thousandths <= 10_000


def test_five_requests_earn_a_retry_and_ten_are_saved_at_most() -> None:
    """A request earns exactly a fifth of a retry, without rounding errors."""
    budget = RetryBudget()
    assert earned(budget) is budget
    for _ in range(10):
        budget = spent(budget)
    for _ in range(4):
        budget = earned(budget)
    assert not budget.suffices
    assert earned(budget).suffices
    for _ in range(1000):
        budget = earned(budget)
    assert budget == RetryBudget()


@pytest.mark.parametrize(
    "deaths, attempts, budget, reason",
    [
        (0, 1, RetryBudget(), None),
        (1, 1, RetryBudget(), None),
        (1, 2, RetryBudget(1000), None),
        (2, 2, RetryBudget(), "poison"),
        (3, 9, RetryBudget(0), "poison"),
        (1, 3, RetryBudget(), "attempts"),
        (1, 4, RetryBudget(), "attempts"),
        (0, 1, RetryBudget(999), "budget"),
    ],
)
def test_retry_refusal(deaths: int, attempts: int, budget: RetryBudget, reason: str | None) -> None:
    """Two dead replicas, three attempts or an empty budget end the attempts; the replicas count first."""
    assert retry_refusal(deaths, attempts, budget) == reason


A, B = Failure("a", 500, 0.1), Failure("b", 500, 9.0)


@pytest.mark.parametrize(
    "failures, at_fault",
    [
        ((A, B), True),
        ((A, B, Failure("c", 500, 1.0)), True),
        ((), False),
        ((A,), False),
        ((A, A), False),
        ((A, B._replace(engine_status=501)), False),
        ((A, B._replace(engine_status=None)), False),
        ((A._replace(engine_status=None), B._replace(engine_status=None)), False),
        ((A, B._replace(seconds=11.0)), False),
    ],
)
def test_a_request_that_is_at_fault(failures: tuple[Failure, ...], at_fault: bool) -> None:
    """Different replicas, the same status, quickly."""
    assert request_is_at_fault(failures) is at_fault


def test_a_free_retry() -> None:
    """The budget does not limit it; deaths and attempts do."""
    assert retry_refusal(0, 1, RetryBudget(0), free=True) is None
    assert retry_refusal(0, 3, RetryBudget(), free=True) == "attempts"
