"""What an external model has cost today, against its budget; pure. Days begin at 00:00 UTC."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import msgspec

from gateway.routing.target import PIN


class DaySpend(msgspec.Struct, frozen=True):
    """US dollars that were spent on one day, as a number since 1970-01-01."""

    day: int = 0
    usd: float = 0.0

    def on(self, day: int) -> "DaySpend":
        """What was spent on a day: nothing, if that is another day."""
        return self if self.day == day else DaySpend(day)

    def plus(self, usd: float, day: int) -> "DaySpend":
        """Add a cost of that day."""
        return DaySpend(day, self.on(day).usd + usd)

    def exhausts(self, usd_per_day: float | None, day: int) -> bool:
        """Return whether nothing of a budget is left on a day; None is no budget."""
        return usd_per_day is not None and self.on(day).usd >= usd_per_day


def spent_by_variant(cost_by_alias: Mapping[str, float], ladders: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Attribute what aliases have cost today to external variants, for the start of a process.

    `ladders` are the external variants of each alias; a variant that clients pin is an alias of itself, also as
    ALIAS@VARIANT. An alias with several of them counts for each, which is the safe side of a budget.
    """
    spent: dict[str, float] = {}
    for alias, usd in cost_by_alias.items():
        for variant in ladders.get(alias, (alias.rpartition(PIN)[2],)):
            spent[variant] = spent.get(variant, 0.0) + usd
    return spent


def day_of(at_seconds: float) -> int:
    """The day of a time since 1970."""
    return int(at_seconds // timedelta(days=1).total_seconds())


def seconds_left(at_seconds: float) -> float:
    """How long the day of a time lasts from then on."""
    return (day_of(at_seconds) + 1) * timedelta(days=1).total_seconds() - at_seconds


def budget_spent(usd_per_day: float, day: int) -> str:
    """Why a model is not available."""
    until = datetime.fromtimestamp((day + 1) * timedelta(days=1).total_seconds(), UTC)
    return f"its budget of {usd_per_day:g} USD a day is spent; available again at {until:%Y-%m-%d %H:%M} UTC"


def budget_reserved(usd_per_day: float) -> str:
    """Why a model has to wait for requests that run."""
    return f"requests that run may cost the rest of its budget of {usd_per_day:g} USD a day"
