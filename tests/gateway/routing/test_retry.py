"""How many requests may be tried again, and which never."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.retry import RetryBudget, earned, spent, why_not_again


@given(st.lists(st.booleans(), max_size=400))
def test_retries_are_a_share_of_the_traffic(events: list[bool]) -> None:
    """However requests and wishes for a retry come, no more than ten and a fifth of the requests are made."""
    budget, requests, retries = RetryBudget(), 0, 0
    for wish in events:
        if not wish:
            budget = earned(budget)
            requests += 1
        elif budget.suffices:
            budget = spent(budget)
            retries += 1
        assert 5 * retries <= 50 + requests
        assert 0 <= budget.thousandths <= 10_000


def test_every_fifth_request_buys_a_retry_and_no_more_than_ten_are_saved() -> None:
    """Exactly: nothing is lost to rounding, either."""
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
    "deaths, attempts, budget, why",
    [
        (0, 1, RetryBudget(), None),
        (1, 1, RetryBudget(), None),
        (1, 3, RetryBudget(1000), None),
        (2, 2, RetryBudget(), "poison"),
        (3, 9, RetryBudget(0), "poison"),
        (1, 4, RetryBudget(), "attempts"),
        (0, 1, RetryBudget(999), "budget"),
    ],
)
def test_why_a_request_is_not_tried_again(deaths: int, attempts: int, budget: RetryBudget, why: str | None) -> None:
    """A request that two replicas didn't survive is never tried again, whatever the budget holds."""
    assert why_not_again(deaths, attempts, budget) == why
