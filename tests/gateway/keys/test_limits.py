"""The limits of API keys, with real requests."""

from hashlib import sha256
from typing import Any

import pytest

from gateway.keys import StoredKey, keys_in_force
from tests.fakes.running import FakeReplica, running_fake
from tests.gateway.fleet import CHAT, HELLO, STREAM, Fleet, deployment, error_of, events_in, running_gateway, text_of

pytestmark = pytest.mark.asyncio(loop_scope="session")


def key(name: str, **limits: Any) -> StoredKey:
    """A key whose secret is its name."""
    return StoredKey(sha256=(sha256(name.encode()).hexdigest(),), **limits)


KEYS = keys_in_force(
    {
        "free": key("free"),
        "twice": key("twice", requests_per_minute=2),
        "frugal": key("frugal", tokens_per_minute=20),
        "alone": key("alone", concurrency=1),
        "picky": key("picky", floor={"top1_agreement": 0.95}),
        "brief": key("brief", max_tokens=3),
        "trusted": key("trusted", may=("chat_template",)),
    }
)


async def ask(fleet: Fleet, name: str, body: dict[str, Any] = HELLO) -> Any:
    """Send a request with a key."""
    return await fleet.ask(body, {"authorization": f"Bearer {name}"})


async def test_requests_and_tokens_per_minute(fake: FakeReplica) -> None:
    """A request beyond a limit gets 429 with the remaining quota and a retry-after; other keys are not affected."""
    async with running_gateway(deployment(keys=KEYS)) as fleet:
        with fleet.replicas(("hi", fake.url)):
            answers = [await ask(fleet, "twice") for _ in range(3)]
            assert [answer.status_code for answer in answers] == [200, 200, 429]
            assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
            assert error_of(answers[-1])["code"] == "rate_limit_exceeded"
            assert 0 < int(answers[-1].headers["retry-after"]) <= 60
            assert [(await ask(fleet, "frugal")).status_code for _ in range(2)] == [200, 429]
            assert (await ask(fleet, "free")).status_code == 200
        assert await fleet.total("quantgate_rejections_total", reason="rate_limit") == 2


async def test_concurrency() -> None:
    """A second request of the key is refused while the first one runs; a stream that is cut short is metered."""
    async with (
        running_fake("--fake-stall-after-tokens", "2") as fake,
        running_gateway(deployment(keys=KEYS)) as fleet,
    ):
        with fleet.replicas(("hi", fake.url)):
            own = {"authorization": "Bearer alone"}
            async with fleet.client.stream("POST", CHAT, json=STREAM, headers=own) as answer:
                await anext(answer.aiter_lines())
                assert (await ask(fleet, "alone")).status_code == 429
            await fleet.at_rest()
            fake.resume()
            assert (await ask(fleet, "alone")).status_code == 200
        assert await fleet.total("quantgate_tokens_total", kind="completion", alias="smol") >= 2


async def test_the_floor_of_a_key(fake: FakeReplica) -> None:
    """It applies in addition to those of the request and the alias."""
    async with running_gateway(deployment(keys=KEYS)) as fleet:
        with fleet.replicas(("lo", fake.url)):
            assert (await ask(fleet, "free")).headers["x-quantgate-precision"] == "int4"
            refused = await ask(fleet, "picky", {**HELLO, "model": "team/small"})
            assert (refused.status_code, error_of(refused)["code"]) == (503, "quality_floor_unmet")


async def test_the_length_of_an_answer(fake: FakeReplica) -> None:
    """The key's `max_tokens` is filled in where the client sets none; a larger value is refused."""
    async with running_gateway(deployment(keys=KEYS)) as fleet:
        with fleet.replicas(("hi", fake.url)):
            assert (await ask(fleet, "brief")).json()["usage"]["completion_tokens"] == 3
            assert len(text_of(events_in((await ask(fleet, "brief", STREAM)).content)).split()) == 3
            refused = await ask(fleet, "brief", {**HELLO, "max_tokens": 4})
            assert (refused.status_code, error_of(refused)["param"]) == (400, "max_tokens")


async def test_guarded_fields(fake: FakeReplica) -> None:
    """They are passed on only for a key that may send them; from other keys they are dropped."""
    async with running_gateway(deployment(keys=KEYS)) as fleet:
        with fleet.replicas(("hi", fake.url)):
            for name, passed in (("free", False), ("trusted", True)):
                body = {**HELLO, "chat_template": "{{ x }}", "kv_transfer_params": {"a": 1}, "top_k": 3}
                assert (await ask(fleet, name, body)).status_code == 200
                sent = fake.requests(CHAT)[-1]["body"]
                assert ("chat_template" in sent, "kv_transfer_params" in sent, sent["top_k"]) == (passed, False, 3)
