"""How many requests may be tried again, and which never."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.budget import Budget, earned, spent, why_not_again


@given(st.lists(st.booleans(), max_size=400))
def test_retries_are_a_share_of_the_traffic(events: list[bool]) -> None:
    """However requests and wishes for a retry come, no more than ten and a fifth of the requests are made."""
    budget, requests, retries = Budget(), 0, 0
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
    budget = Budget()
    assert earned(budget) is budget
    for _ in range(10):
        budget = spent(budget)
    for _ in range(4):
        budget = earned(budget)
    assert not budget.suffices
    assert earned(budget).suffices
    for _ in range(1000):
        budget = earned(budget)
    assert budget == Budget()


@pytest.mark.parametrize(
    "deaths, attempts, budget, why",
    [
        (0, 1, Budget(), None),
        (1, 1, Budget(), None),
        (1, 3, Budget(1000), None),
        (2, 2, Budget(), "poison"),
        (3, 9, Budget(0), "poison"),
        (1, 4, Budget(), "attempts"),
        (0, 1, Budget(999), "budget"),
    ],
)
def test_why_a_request_is_not_tried_again(deaths: int, attempts: int, budget: Budget, why: str | None) -> None:
    """A request that two replicas didn't survive is never tried again, whatever the budget holds."""
    assert why_not_again(deaths, attempts, budget) == why
