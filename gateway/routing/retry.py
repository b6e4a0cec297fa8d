"""Whether a request may be tried again: a share of the traffic, and never a request that kills replicas."""

from dataclasses import dataclass
from typing import Literal

RetryRefusal = Literal["poison", "attempts", "budget"]

# One retry; whole numbers, so that no rounding gives one away.
_RETRY_THOUSANDTHS = 1000


@dataclass(frozen=True, slots=True)
class RetryAllowance:
    """What every request adds, and how much may be saved up, in thousandths of a retry."""

    per_request_thousandths: int = 200
    most_thousandths: int = 10_000


DEFAULT_ALLOWANCE = RetryAllowance()


@dataclass(frozen=True, slots=True)
class RetryBudget:
    """Retries that may be made, in thousandths; some from the start, so that a quiet gateway can retry at all."""

    thousandths: int = DEFAULT_ALLOWANCE.most_thousandths

    @property
    def suffices(self) -> bool:
        """Tell whether one more retry may be made."""
        return self.thousandths >= _RETRY_THOUSANDTHS


def earned(budget: RetryBudget, allowance: RetryAllowance = DEFAULT_ALLOWANCE) -> RetryBudget:
    """Add what a request that has just arrived is worth; a full budget comes back as it is."""
    if budget.thousandths >= allowance.most_thousandths:
        return budget
    return RetryBudget(min(budget.thousandths + allowance.per_request_thousandths, allowance.most_thousandths))


def spent(budget: RetryBudget) -> RetryBudget:
    """Take out one retry, which `why_not_again` allowed."""
    assert budget.suffices, "a retry that the budget doesn't hold"
    return RetryBudget(budget.thousandths - _RETRY_THOUSANDTHS)


def why_not_again(
    deaths: int, attempts: int, budget: RetryBudget, *, most_deaths: int = 2, most_attempts: int = 4
) -> RetryRefusal | None:
    """Say why a request is not tried again, None if it may be.

    `deaths` counts the different replicas whose connection died with this request under way, `attempts` the
    exchanges that were begun. A request that two replicas didn't survive is taken for the cause.
    """
    if deaths >= most_deaths:
        return "poison"
    if attempts >= most_attempts:
        return "attempts"
    return None if budget.suffices else "budget"
