"""Whether a failed request may be tried again: a share of the traffic, and never one that kills replicas."""

from dataclasses import dataclass
from typing import Literal

RetryRefusal = Literal["poison", "attempts", "budget"]

# After this many deaths of replicas, the request is taken for the cause.
MAX_DEATHS = 2
MAX_ATTEMPTS = 3

# One retry. In thousandths, because sums of floats would drift.
_RETRY_THOUSANDTHS = 1000


@dataclass(frozen=True, slots=True)
class RetryAllowance:
    """What every request adds to the budget, and how much can be saved, in thousandths of a retry."""

    per_request_thousandths: int = 200
    max_thousandths: int = 10_000


DEFAULT_ALLOWANCE = RetryAllowance()


@dataclass(frozen=True, slots=True)
class RetryBudget:
    """Retries that may be made, in thousandths; full at the start, so that a quiet gateway can retry at all."""

    thousandths: int = DEFAULT_ALLOWANCE.max_thousandths

    @property
    def suffices(self) -> bool:
        """Whether one more retry may be made."""
        return self.thousandths >= _RETRY_THOUSANDTHS


def earned(budget: RetryBudget, allowance: RetryAllowance = DEFAULT_ALLOWANCE) -> RetryBudget:
    """Add what one request earns; a full budget comes back as it is."""
    if budget.thousandths >= allowance.max_thousandths:
        return budget
    return RetryBudget(min(budget.thousandths + allowance.per_request_thousandths, allowance.max_thousandths))


def limited(budget: RetryBudget, allowance: RetryAllowance) -> RetryBudget:
    """Take out what another allowance does not let save."""
    return RetryBudget(min(budget.thousandths, allowance.max_thousandths))


def spent(budget: RetryBudget) -> RetryBudget:
    """Take one retry out, which `retry_refusal` allowed."""
    assert budget.suffices, "a retry that the budget does not hold"
    return RetryBudget(budget.thousandths - _RETRY_THOUSANDTHS)


def retry_refusal(deaths: int, attempts: int, budget: RetryBudget) -> RetryRefusal | None:
    """Return why a request is not tried again; None if it may be.

    `deaths` counts the replicas whose connection died with this request under way, `attempts` the exchanges begun.
    """
    if deaths >= MAX_DEATHS:
        return "poison"
    if attempts >= MAX_ATTEMPTS:
        return "attempts"
    return None if budget.suffices else "budget"
