"""The cost of a day against a budget: values, and their owner on a clock of the test."""

import asyncio

import pytest

from config.external import ExternalModel, Price
from gateway.observability.metrics import Metrics
from gateway.proxy.external_models import ExternalModels, external_ladders
from gateway.routing.budget import DaySpend, budget_spent, day_of, seconds_left, spent_by_variant
from serving.registry import Registry
from serving.replica import Replica, State
from tests.gateway.external.conftest import tables
from tests.gateway.fleet import deployment

DAY = 86400.0
NOON = 20_000 * DAY + DAY / 2


@pytest.mark.parametrize(
    "spend, limit, day, exhausted",
    [
        (DaySpend(5, 1.0), None, 5, False),
        (DaySpend(5, 0.99), 1.0, 5, False),
        (DaySpend(5, 1.0), 1.0, 5, True),
        (DaySpend(5, 9.0), 1.0, 6, False),
        (DaySpend(5, 0.0), 0.0, 5, True),
    ],
)
def test_a_budget_is_of_one_day(spend: DaySpend, limit: float | None, day: int, exhausted: bool) -> None:
    """Nothing is left when the cost reaches it; the next day begins with all of it."""
    assert spend.exhausts(limit, day) is exhausted


def test_costs_add_up_within_a_day() -> None:
    """The first cost of another day forgets the day before."""
    assert DaySpend(5, 1.0).plus(0.5, 5) == DaySpend(5, 1.5)
    assert DaySpend(5, 1.0).plus(0.5, 6) == DaySpend(6, 0.5)
    assert day_of(NOON) == 20_000
    assert seconds_left(NOON) == DAY / 2
    assert budget_spent(20.0, 20_000) == (
        "its budget of 20 USD a day is spent; available again at 2024-10-05 00:00 UTC"
    )
    assert Price(2e-6, 8e-6).cost_usd(1000, 200) == pytest.approx(0.0036)


def test_what_aliases_have_cost() -> None:
    """By the external variants of each; a pinned variant is an alias of itself."""
    ladders = {"smol": ["gpt"], "other": ["gpt", "claude"]}
    spent = spent_by_variant({"smol": 1.0, "other": 2.0, "gpt": 0.25, "smol@gpt": 0.25}, ladders)
    assert spent == {"gpt": 3.5, "claude": 2.0}
    assert external_ladders(deployment(tables("http://127.0.0.1:1")).settings)["measured"] == ("claude",)


class Clock:
    """A wall clock that a test sets."""

    now = NOON

    def __call__(self) -> float:
        return self.now


def model(usd_per_day: float | None) -> Replica:
    """An external model with a budget."""
    external = ExternalModel("openai/gpt-4.1", usd_per_day=usd_per_day)
    return Replica("gpt-external", "gpt", "external", external.address, external.name, external=external)


async def test_a_new_day() -> None:
    """A model whose budget is spent returns by itself."""
    registry, clock = Registry(), Clock()
    clock.now = 20_001 * DAY - 0.05
    with ExternalModels(registry, Metrics(), loaded=True, wall_clock=clock) as models:
        models.replace((model(1.0),))
        models.book("gpt", 1.0)
        assert registry.status("gpt-external").state is State.STOPPED
        clock.now = 20_001 * DAY + 1
        async with asyncio.timeout(5):
            while registry.status("gpt-external").state is State.STOPPED:
                await registry.changed()
    assert registry.snapshot() == ()


async def test_what_was_spent_before_the_start() -> None:
    """A start value of all workers counts for today; each has its share of it, and of a budget."""
    registry, clock = Registry(), Clock()
    with ExternalModels(registry, Metrics(), loaded=True, share=0.5, spent={"gpt": 0.8}, wall_clock=clock) as models:
        models.replace((model(1.0),))
        assert registry.status("gpt-external").state is State.READY
        models.book("gpt", 0.2)
        assert "budget of 0.5 USD" in registry.status("gpt-external").reason
        models.replace((model(None),))
        assert registry.status("gpt-external").state is State.READY


async def test_without_litellm() -> None:
    """A model that a reload adds to a process without any waits for the next start, and says so."""
    registry = Registry()
    with ExternalModels(registry, Metrics(), loaded=False) as models:
        models.replace((model(None),))
        status = registry.status("gpt-external")
        assert (status.state, status.reason) == (
            State.STOPPED,
            "litellm is loaded at the start only; restart the gateway",
        )


def test_secrets() -> None:
    """No text of a model has them, and they are masked in what others write."""
    secret = ExternalModel(
        "openai/m", api_key="sk-very-secret", credentials=(("aws_secret_access_key", "also-secret"),)
    )
    assert "secret" not in repr(secret).replace("aws_secret_access_key", "")
    assert secret.masked("bad key sk-very-secret and also-secret") == "bad key ********** and **********"
