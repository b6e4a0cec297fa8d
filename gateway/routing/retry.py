"""Whether a failed request may be tried again, and whether its failures say something about replicas.

Retries are a share of the traffic. A request that kills replicas is not tried again, and one that fails everywhere in
the same way is at fault itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

RetryRefusal = Literal["poison", "attempts", "budget"]

# After this many deaths of replicas, the request is taken for the cause.
MAX_DEATHS = 2
MAX_ATTEMPTS = 3

# Engines need so long to find out that they cannot do what a request asks, such as to load an image by its URL.
QUICK_SECONDS = 10.0

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


def refunded(budget: RetryBudget, retries: int, allowance: RetryAllowance = DEFAULT_ALLOWANCE) -> RetryBudget:
    """Put back retries that say nothing about replicas, or requests that are at fault would use the budget up."""
    return RetryBudget(min(budget.thousandths + retries * _RETRY_THOUSANDTHS, allowance.max_thousandths))


def retry_refusal(deaths: int, attempts: int, budget: RetryBudget, *, free: bool = False) -> RetryRefusal | None:
    """Return why a request is not tried again; None if it may be.

    `deaths` counts the replicas whose connection died with this request under way, `attempts` the exchanges begun. A
    `free` retry is not limited by the budget.
    """
    if deaths >= MAX_DEATHS:
        return "poison"
    if attempts >= MAX_ATTEMPTS:
        return "attempts"
    return None if free or budget.suffices else "budget"


class Failure(NamedTuple):
    """One failed attempt: the status with which the engine replied, None if it did not; and how long that took."""

    replica_id: str
    engine_status: int | None
    seconds: float


def request_is_at_fault(failures: Sequence[Failure]) -> bool:
    """Whether the failures of a request follow it: different replicas failed quickly, all with the same status.

    Such failures are held against no replica. Otherwise one client's bad request would shut out all of them.
    """
    return (
        len({failure.replica_id for failure in failures}) > 1
        and len({failure.engine_status for failure in failures}) == 1
        and failures[0].engine_status is not None
        and all(failure.seconds <= QUICK_SECONDS for failure in failures)
    )
