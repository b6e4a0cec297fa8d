"""Aliases that end in an external model, asked by the real OpenAI SDK; and what answers cost."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from openai import APIStatusError, AsyncOpenAI

from serving.replica import State
from tests.fakes.running import DEADLINE_SECONDS, FakeReplica, running_fake
from tests.gateway.external.conftest import ANSWER_USD, tables
from tests.gateway.external.test_answers import TOOL, asking
from tests.gateway.fleet import Fleet, deployment, running_gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")

HELLO: Any = [{"role": "user", "content": "hello"}]
TOOLS: Any = [TOOL]


@pytest_asyncio.fixture(loop_scope="session")
async def sdk(fleet: Fleet) -> AsyncIterator[AsyncOpenAI]:
    """A client as an application makes it, but for retries."""
    async with AsyncOpenAI(
        base_url=f"{fleet.url}/v1", api_key="any", timeout=DEADLINE_SECONDS, max_retries=0
    ) as client:
        yield client


async def test_it_answers_while_all_replicas_are_down(fleet: Fleet, sdk: AsyncOpenAI) -> None:
    """Streamed, with a tool call, through the SDK; the headers say who it was."""
    with fleet.replicas(("hi", "http://127.0.0.1:9"), ("lo", "http://127.0.0.1:9"), state=State.FAILED):
        raw = await sdk.chat.completions.with_raw_response.create(
            model="smol", messages=HELLO, tools=TOOLS, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in raw.parse()]
    calls = [call for each in chunks for choice in each.choices for call in choice.delta.tool_calls or ()]
    assert calls[0].function is not None
    assert (calls[0].id, calls[0].function.name) == ("call_1", "weather")
    assert json.loads("".join(call.function.arguments or "" for call in calls if call.function)) == {"city": "Paris"}
    assert [choice.finish_reason for each in chunks for choice in each.choices if choice.finish_reason] == [
        "tool_calls"
    ]
    assert [(each.usage.prompt_tokens, each.usage.completion_tokens) for each in chunks if each.usage] == [(1000, 200)]
    assert {each.model for each in chunks} == {"smol"}
    headers = [raw.headers[f"x-quantgate-{name}"] for name in ("variant", "precision", "reason", "attempts")]
    assert headers == ["gpt", "external", "fallback", "1"]


async def test_it_takes_over_from_a_replica_that_fails(fleet: Fleet, sdk: AsyncOpenAI) -> None:
    """A replica that is gone but looks ready: the second attempt is outside."""
    with fleet.replicas(("hi", "http://127.0.0.1:9")):
        raw = await sdk.chat.completions.with_raw_response.create(model="smol", messages=HELLO)
    assert raw.parse().choices[0].message.content == "you said hello é汉"
    assert [raw.headers[f"x-quantgate-{name}"] for name in ("variant", "reason", "attempts")] == [
        "gpt",
        "fallback",
        "2",
    ]


async def test_a_replica_that_answers_is_preferred(fleet: Fleet, fake: FakeReplica, sdk: AsyncOpenAI) -> None:
    """Its speed is not known either, but it is ours."""
    with fleet.replicas(("lo", fake.url)):
        raw = await sdk.chat.completions.with_raw_response.create(model="smol", messages=HELLO)
    assert raw.headers["x-quantgate-variant"] == "lo"


@pytest.mark.parametrize(
    "alias, floor, code",
    [
        ("strict", None, "no_ready_replica"),  # declared 0.9, the floor is 0.95
        ("strict-cautious", None, "quality_floor_unmet"),  # declared, and not trusted
        ("measured", None, "no_ready_replica"),  # declares nothing
        ("strict-trusting", "top1_agreement=0.91", "quality_floor_unmet"),
        ("smol", "kl_mean=9", "no_ready_replica"),
    ],
)
async def test_never_above_a_floor_that_it_does_not_declare(
    fleet: Fleet, sdk: AsyncOpenAI, alias: str, floor: str | None, code: str
) -> None:
    """Whatever is down: then the request is refused, as it is without an external model."""
    headers = {"x-quantgate-floor": floor} if floor else {}
    with pytest.raises(APIStatusError) as refused:
        await sdk.chat.completions.create(model=alias, messages=HELLO, extra_headers=headers)
    assert (refused.value.status_code, refused.value.code) == (503, code)


async def test_a_floor_that_it_declares(sdk: AsyncOpenAI) -> None:
    """An alias that trusts declared quality takes it."""
    answer = await sdk.chat.completions.create(model="strict-trusting", messages=HELLO)
    assert answer.choices[0].message.content == "you said hello é汉"


async def test_the_precisions_of_a_request(fleet: Fleet, sdk: AsyncOpenAI) -> None:
    """A client that lists precisions gets nothing from outside, unless it says so."""
    with pytest.raises(APIStatusError) as refused:
        await sdk.chat.completions.create(
            model="smol", messages=HELLO, extra_headers={"x-quantgate-precision": "bf16,int4"}
        )
    assert refused.value.status_code == 503
    allowed = {"x-quantgate-precision": "bf16, external"}
    raw = await sdk.chat.completions.with_raw_response.create(model="smol", messages=HELLO, extra_headers=allowed)
    assert raw.headers["x-quantgate-precision"] == "external"


# Cost


async def test_what_an_answer_costs(fleet: Fleet) -> None:
    """By the configured price, by alias and variant; one that breaks off costs what arrived of it."""
    name = "quantgate_external_cost_usd_total"
    before = await fleet.total(name, alias="smol", variant="gpt")
    assert (await fleet.ask(asking("smol", "hello"))).status_code == 200
    assert (await fleet.ask(asking("smol", "hello", stream=True))).status_code == 200
    assert await fleet.total(name, alias="smol", variant="gpt") == pytest.approx(before + 2 * ANSWER_USD)
    assert await fleet.total("quantgate_tokens_total", alias="smol", variant="gpt", precision="external") >= 2400
    broken = await fleet.total(name, alias="claude")
    await fleet.ask(asking("claude", "begin and die", stream=True))
    assert 0 < await fleet.total(name, alias="claude") - broken < ANSWER_USD
    silent = await fleet.total(name, alias="hurried")
    assert (await fleet.ask(asking("hurried", "stall"))).status_code == 504
    assert 0 < await fleet.total(name, alias="hurried") - silent < ANSWER_USD


async def test_litellms_table_of_prices(fleet: Fleet) -> None:
    """Without a configured price; cached tokens of the prompt are cheaper."""
    assert (await fleet.ask(asking("listed", "hello"))).status_code == 200
    cost = await fleet.total("quantgate_external_cost_usd_total", alias="listed")
    assert cost == pytest.approx((600 * 0.4 + 400 * 0.1 + 200 * 1.6) / 1e6)


@pytest_asyncio.fixture(loop_scope="session")
async def frugal(provider: FakeReplica) -> AsyncIterator[Fleet]:
    """A gateway whose models may cost as much as one answer a day, and a little."""
    changes = tables(provider.url)
    changes["variants"]["gpt"]["budget"] = {"usd_per_day": ANSWER_USD * 1.5}
    async with running_gateway(deployment(changes)) as fleet:
        yield fleet


async def test_a_budget(frugal: Fleet) -> None:
    """When it is spent, the model is not available, and everything says why; replicas answer as before."""
    assert (await frugal.ask(asking("smol", "hello"))).status_code == 200
    assert (await frugal.ask(asking("smol", "hello"))).status_code == 200
    refused = await frugal.ask(asking("smol", "hello"))
    assert refused.status_code == 503, refused.text
    (shown,) = [each for each in (await frugal.admin.get("/admin/replicas")).json() if each["id"] == "gpt-external"]
    assert shown["state"] == "stopped"
    assert shown["reason"].startswith("its budget of 0.0054 USD a day is spent; available again at ")
    state = (await frugal.admin.get("/admin/routing")).json()
    assert [each["reason"] for each in state["absent"] if each["id"] == "gpt-external"] == [shown["reason"]]
    assert (await frugal.admin.get("/readyz")).json()["aliases"]["smol"] == []
    assert await frugal.total("quantgate_external_spent_usd", variant="gpt") == pytest.approx(2 * ANSWER_USD)
    assert await frugal.total("quantgate_external_budget_usd", variant="gpt") == pytest.approx(1.5 * ANSWER_USD)
    async with running_fake() as replica:
        with frugal.replicas(("hi", replica.url)):
            answer = await frugal.ask(asking("smol", "hello"))
    assert answer.headers["x-quantgate-variant"] == "hi"


async def test_a_larger_budget_at_a_reload(frugal: Fleet, provider: FakeReplica) -> None:
    """What was spent stays spent; what is left is available at once, and a removed model is gone."""
    for _ in range(2):
        assert (await frugal.ask(asking("smol", "hello"))).status_code == 200
    changes = tables(provider.url)
    changes["variants"]["gpt"]["budget"] = {"usd_per_day": ANSWER_USD * 2.5}
    frugal.served.switch(deployment(changes))
    assert (await frugal.ask(asking("smol", "hello"))).status_code == 200
    assert (await frugal.ask(asking("smol", "hello"))).status_code == 503
    del changes["variants"]["nova"]
    frugal.served.switch(deployment(changes))
    assert "nova-external" not in {each["id"] for each in (await frugal.admin.get("/admin/replicas")).json()}


async def test_a_budget_survives_a_restart(provider: FakeReplica, tmp_path: Path) -> None:
    """What was spent today is in the usage of the state database."""
    changes = tables(provider.url)
    changes["variants"]["gpt"]["budget"] = {"usd_per_day": ANSWER_USD * 1.5}
    recorded = replace(deployment(changes), state=f"sqlite:///{tmp_path}/state.db")
    async with running_gateway(recorded) as fleet:
        for model in ("smol", "gpt"):
            assert (await fleet.ask(asking(model, "hello"))).status_code == 200
        await fleet.at_rest()
    async with running_gateway(recorded) as fleet:
        assert await fleet.total("quantgate_external_spent_usd", variant="gpt") == pytest.approx(2 * ANSWER_USD)
        assert (await fleet.ask(asking("smol", "hello"))).status_code == 503
