"""The retry budget of a gateway: every request earns a share of a retry, a retry spends one."""

from config.schema import RetrySettings
from gateway.routing import retry


class Retries:
    """Owns what is left of the budget."""

    __slots__ = ("_allowance", "_budget")

    def __init__(self, settings: RetrySettings) -> None:
        self._allowance = _allowance(settings)
        self._budget = retry.RetryBudget(self._allowance.max_thousandths)

    def __repr__(self) -> str:
        return f"<Retries [{self._budget.thousandths / 1000:g} retries left]>"

    def earn(self) -> None:
        """Add what one request earns."""
        if self._budget.thousandths < self._allowance.max_thousandths:
            self._budget = retry.earned(self._budget, self._allowance)

    def refusal(self, deaths: int, attempts: int, *, free: bool = False) -> retry.RetryRefusal | None:
        """Return why a request is not tried again; None allows it, if there is a replica for it."""
        return retry.retry_refusal(deaths, attempts, self._budget, free=free)

    def spend(self) -> None:
        """Take out a retry that was allowed, and found a replica in the same step."""
        self._budget = retry.spent(self._budget)

    def refund(self, retries: int) -> None:
        """Put back retries that say nothing about replicas."""
        self._budget = retry.refunded(self._budget, retries, self._allowance)

    def set_limits(self, settings: RetrySettings) -> None:
        """Use another allowance from the next request on."""
        self._allowance = _allowance(settings)
        self._budget = retry.limited(self._budget, self._allowance)


def _allowance(settings: RetrySettings) -> retry.RetryAllowance:
    return retry.RetryAllowance(round(settings.share * 1000), settings.burst * 1000)
