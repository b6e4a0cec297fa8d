"""The cost of a day against a budget: values, and their owner on a clock of the test."""

import asyncio
import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter, ValidationError

from config.external import ExternalModel, Price
from config.field_types import ProviderUrl
from gateway.errors import GatewayError, ReplicaFull
from gateway.observability.metrics import Metrics
from gateway.openai.external_estimate import answer_tokens_limit, prompt_tokens
from gateway.proxy.external_models import ExternalModels, external_ladders
from gateway.proxy.upstream.external import ExternalUpstream, translated_errors
from gateway.proxy.upstream.external_parameters import ParameterTable
from gateway.proxy.upstream.protocol import UpstreamRequest
from gateway.proxy.upstream.provider_errors import MAX_WORDS
from gateway.routing.budget import DaySpend, budget_spent, day_of, seconds_left, spent_by_variant
from gateway.routing.target import Timeouts
from serving.registry import Registry
from serving.replica import Replica, State
from tests.gateway.external.conftest import tables
from tests.gateway.fleet import deployment
from tests.gateway.openai.parsing import parse

DAY = 86400.0
IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{'A' * 100_000}"}}
PRICED = ExternalModel("openai/gpt-4.1", price=Price(1e-6, 1e-6))
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


def charge(models: ExternalModels, usd: float) -> None:
    """A request that has cost so much."""
    models.reserve("gpt", 0.0)
    models.settle("gpt", 0.0, usd)


async def test_what_running_requests_may_cost() -> None:
    """It counts while they run: any number of them exceeds a budget by what one may cost."""
    registry, clock = Registry(), Clock()
    with ExternalModels(registry, Metrics(), loaded=True, wall_clock=clock) as models:
        models.replace((model(1.0),))
        models.reserve("gpt", 0.6)
        assert registry.status("gpt-external").state is State.READY
        models.reserve("gpt", 0.6)
        assert registry.status("gpt-external").state is State.STARTING
        with pytest.raises(ReplicaFull):
            models.reserve("gpt", 0.1)
        models.settle("gpt", 0.6, 0.1)
        assert registry.status("gpt-external").state is State.READY
        models.settle("gpt", 0.6, 0.0)
        models.reserve("gpt", 0.1)
        models.settle("gpt", 0.1, 0.9)
        assert registry.status("gpt-external").state is State.STOPPED


@pytest.mark.parametrize(
    "fields, tokens, limit",
    [
        ({"messages": [{"role": "user", "content": "x" * 4000}]}, 1003, None),
        ({"messages": [{"role": "user", "content": [IMAGE]}], "max_tokens": 5}, 1503, 5),
        ({"input": "x" * 400, "max_output_tokens": 7, "store": False}, 100, 7),
        ({"prompt": [1, 2, 3], "max_tokens": 9, "n": 3}, 3, 27),
        ({"prompt": "x" * 8, "n": True, "max_tokens": None}, 2, None),
    ],
)
def test_an_estimate(fields: dict[str, Any], tokens: int, limit: int | None) -> None:
    """Text by its bytes; an image is as many tokens as any other, whatever its base64."""
    assert prompt_tokens(fields) == tokens
    assert answer_tokens_limit(fields) == limit


class Provider:
    """Stands in for litellm: it answers nothing, and says or does not say that it has sent a request."""

    model_cost: Mapping[str, Any] = {"gpt-4.1": {"max_input_tokens": 2000}}
    main = SimpleNamespace(httpx=httpx)

    def __init__(self, *, sends: bool) -> None:
        self.sends = sends
        self.begun = asyncio.Event()

    async def acompletion(self, **arguments: Any) -> None:
        """Wait forever."""
        if self.sends:
            arguments["logger_fn"]({})
        self.begun.set()
        await asyncio.Event().wait()


@pytest.mark.parametrize("sends, tokens", [(False, 0), (True, 2000)])
async def test_a_cancelled_request(sends: bool, tokens: int) -> None:
    """It costs nothing before it was sent, and no longer prompt than the model takes."""
    booked: list[float] = []
    registry, replica = Registry(), replace(model(1.0), external=PRICED)
    body = {"model": "gpt", "messages": [{"role": "user", "content": "x" * 100_000}], "max_tokens": 1}
    request = UpstreamRequest(parse(json.dumps(body)), "req-1", book_cost=booked.append)
    provider = Provider(sends=sends)
    with ExternalModels(registry, Metrics(), loaded=True) as models:
        models.replace((replica,))
        task = asyncio.create_task(
            ExternalUpstream(provider, models, ParameterTable(provider)).open(request, replica, Timeouts())
        )
        await provider.begun.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert sum(booked) == pytest.approx(tokens * 1e-6, abs=2e-6)


async def test_a_new_day() -> None:
    """A model whose budget is spent returns by itself."""
    registry, clock = Registry(), Clock()
    clock.now = 20_001 * DAY - 0.05
    with ExternalModels(registry, Metrics(), loaded=True, wall_clock=clock) as models:
        models.replace((model(1.0),))
        charge(models, 1.0)
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
        charge(models, 0.2)
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


@pytest.mark.parametrize(
    "url, valid",
    [
        ("https://api.openai.com/v1", True),
        ("http://127.0.0.1:8000", True),
        ("https://host/a@b/", True),
        ("https://user:secret@host/v1", False),
        ("https://secret@host", False),
        ("https:///v1", False),
        ("https://host/v1?key=secret", False),
    ],
)
def test_no_credential_in_a_base_url(url: str, valid: bool) -> None:
    """The address of a model is shown to operators; `api_key` is not."""
    with contextlib.nullcontext() if valid else pytest.raises(ValidationError):
        TypeAdapter(ProviderUrl).validate_python(url)


async def test_a_secret_where_a_text_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    """No part of it is left at the end of a long text."""
    replica = replace(model(None), external=ExternalModel("openai/m", api_key="sk-very-secret"))
    text = f"{'x' * (MAX_WORDS - 8)}sk-very-secret"
    with pytest.raises(GatewayError) as raised, translated_errors(replica, 1.0, lambda: True):
        raise ValueError(text)
    assert "sk-" not in raised.value.message + caplog.text
