"""Replicas that fail before the first byte, and after it."""

import asyncio
from collections import Counter
from typing import Any

import httpx
import pytest

from gateway.keys import StoredKey, keys_in_force
from serving.replica import State
from tests.fakes.running import DEADLINE_SECONDS, FakeReplica, running_fake
from tests.gateway.fleet import (
    CHAT,
    CONFIG,
    HELLO,
    STREAM,
    Fleet,
    deployment,
    error_of,
    events_in,
    running_gateway,
    text_of,
)
from tests.gateway.keys.test_keys import digest
from tests.gateway.proxy.exchanging import (
    ANSWER,
    DONE,
    FIRST,
    LAST,
    SECOND,
    event,
    routing_headers,
    unused_url,
    urls,
)
from tests.gateway.wire import Behaviour, Peer, answering, chunk, stream, stream_head, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

# Failover

HTML = b"<html><h1>502 Bad Gateway</h1> nginx</html>"
DEAD = b'{"error":{"message":"EngineCore died at /srv/secret","type":"InternalServerError","param":null,"code":500}}'
NO_MODEL = b'{"error":{"message":"The model `m1` does not exist.","type":"NotFoundError","param":"model","code":404}}'
EMPTY_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 0\r\n\r\n"


def failing(*, streaming: bool) -> dict[str, Behaviour | None]:
    """Ways to fail before the client has received anything."""
    return {
        "is unreachable": None,
        "closes without a byte": answering(b""),
        "closes before its headers end": answering(b"HTTP/1.1 200 OK\r\ncontent-type: text"),
        "closes in the middle of its answer": answering(whole(ANSWER)[:-3] if not streaming else stream_head()),
        "is not an HTTP server": answering(b"SSH-2.0-OpenSSH\r\n"),
        "is busy": answering(whole(b'{"error":{"message":"busy"}}', "503 Busy")),
        "fails": answering(whole(DEAD, "500 Internal Server Error")),
        "fails without a body": answering(whole(b"", "500 Internal Server Error")),
        "is behind a broken proxy": answering(whole(HTML, "502 Bad Gateway", "text/html")),
        "refuses the credential": answering(whole(b'{"error":"Unauthorized"}', "401 Unauthorized")),
        "has another model": answering(whole(NO_MODEL, "404 Not Found")),
        "redirects": answering(whole(b"", "307 Temporary Redirect", extra="location: /\r\n")),
        "has an empty body": answering(whole(b"") if not streaming else EMPTY_STREAM),
        "has another body": answering(whole(b"[1]") if not streaming else stream(event("")[:-1])),
        "streams a unary answer or the reverse": answering(whole(ANSWER) if streaming else stream(FIRST, DONE)),
        "starts with an error": answering(stream(event(DEAD.decode()), DONE)),
    }


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("how", failing(streaming=False))
async def test_failover(fleet: Fleet, fake: FakeReplica, how: str, streaming: bool) -> None:
    """While the client has received nothing, another replica is tried, on a lower rung if necessary."""
    before = await fleet.total("quantgate_retries_total", alias="smol")
    async with urls(failing(streaming=streaming)[how]) as (url,):
        with fleet.replicas(("hi", url), ("lo", fake.url)):
            answer = await fleet.ask(STREAM if streaming else HELLO)
    assert answer.status_code == 200
    reason = "spill" if how == "is busy" else "fallback"
    assert routing_headers(answer) == ("lo", "int4", "lo-1", "2", reason)
    assert b"m1 heard" in answer.content if not streaming else text_of(events_in(answer.content))
    assert await fleet.total("quantgate_retries_total", alias="smol") == before + 1


async def test_another_replica_of_the_same_rung(fleet: Fleet, fake: FakeReplica) -> None:
    """Failover prefers the same rung, and the two replicas of the rung still take turns."""
    async with urls(answering(whole(DEAD, "500 No"))) as (url,):
        answers: Counter[tuple[str | None, ...]] = Counter()
        with fleet.replicas(("hi", url), ("hi", fake.url), ("lo", fake.url)):
            for _ in range(6):
                answers[routing_headers(await fleet.ask())] += 1
    assert answers == {("hi", "bf16", "hi-1", "1", "preferred"): 3, ("hi", "bf16", "hi-1", "2", "preferred"): 3}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "how, status, code",
    [
        ("is unreachable", 502, "upstream_unreachable"),
        ("closes without a byte", 502, "upstream_disconnected"),
        ("fails", 502, "upstream_error"),
        ("is behind a broken proxy", 502, "upstream_error"),
        ("refuses the credential", 502, "upstream_misconfigured"),
        ("has another body", 502, None),
        ("starts with an error", 502, None),
    ],
)
async def test_when_all_fail(fleet: Fleet, how: str, status: int, code: str | None, streaming: bool) -> None:
    """The client gets one error in OpenAI's shape with the last replica's headers, and no text of a replica."""
    behaviour = failing(streaming=streaming)[how]
    async with urls(behaviour, behaviour) as (first, second):
        with fleet.replicas(("hi", first), ("lo", second)):
            answer = await fleet.ask(STREAM if streaming else HELLO)
    error = error_of(answer)
    assert answer.status_code == status
    assert error["code"] == code or code is None
    assert routing_headers(answer) == ("lo", "int4", "lo-1", "2", "fallback")
    for word in ("secret", "nginx", "Unauthorized", "127.0.0.1"):
        assert word not in answer.text
    assert "retry-after" not in answer.headers


async def test_when_all_are_busy() -> None:
    """The request waits in the queue, and gets 429 with a retry-after when its time is up."""
    settings = {**CONFIG["gateway"], "limits": {"queue_seconds": 0.3}}
    busy = failing(streaming=False)["is busy"]
    async with running_gateway(deployment({"gateway": settings})) as fleet, urls(busy, busy) as (first, second):
        with fleet.replicas(("hi", first), ("lo", second)):
            answer = await fleet.ask()
        assert (answer.status_code, error_of(answer)["code"]) == (429, "queue_timeout")
        assert 0 < int(answer.headers["retry-after"]) <= 120
        assert answer.headers["x-should-retry"] == "true"
        assert await fleet.total("quantgate_replica_breaker", state="open") == 0, "a refusal is not a failure"


async def test_three_attempts(fleet: Fleet, fake: FakeReplica) -> None:
    """A request that three replicas failed is not tried on a fourth."""
    before_requests = len(fake.requests(CHAT))
    async with urls(*[answering(whole(DEAD, "500 No"))] * 3) as failing_urls:
        with fleet.replicas(*(("hi", url) for url in failing_urls), ("lo", fake.url)):
            answer = await fleet.ask()
    assert (answer.status_code, error_of(answer)["code"]) == (502, "upstream_error")
    assert answer.headers["x-quantgate-attempts"] == "3"
    assert len(fake.requests(CHAT)) == before_requests


@pytest.mark.parametrize(
    "changes, status, param, words",
    [
        ({"max_tokens": "x"}, 400, "body.max_tokens", "valid integer"),
        ({"messages": None}, 400, "body.messages", "Field required"),
        ({"max_tokens": 10**9}, 400, "max_tokens", "cannot be greater than max_model_len"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_client_error_is_not_retried(
    fleet: Fleet, fake: FakeReplica, changes: dict[str, Any], status: int, param: str, words: str, streaming: bool
) -> None:
    """Every engine would refuse it: the client gets the text of the first, with a code that is a string."""
    before_requests = len(fake.requests(CHAT))
    with fleet.replicas(("hi", fake.url), ("lo", fake.url)):
        answer = await fleet.ask({**HELLO, "stream": streaming, **changes})
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (status, param, "invalid_request")
    assert words in error["message"]
    assert routing_headers(answer) == ("hi", "bf16", "hi-0", "1", "preferred")
    assert len(fake.requests(CHAT)) == before_requests + 1


async def test_a_client_error_inside_a_stream(fleet: Fleet, fake: FakeReplica) -> None:
    """An engine that replies 200 and then refuses has sent nothing that was passed on: the client gets the status."""
    refused = event('{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}')
    async with urls(answering(stream(refused, DONE))) as (url,):
        with fleet.replicas(("hi", url), ("lo", fake.url)):
            answer = await fleet.ask(STREAM)
    assert (answer.status_code, error_of(answer)["message"]) == (400, "too long")


# Failures after the first byte


@pytest.mark.parametrize(
    "rest, code",
    [
        (b"", "upstream_disconnected"),
        (chunk(SECOND[:-7]), "upstream_disconnected"),
        (chunk(b""), "upstream_disconnected"),
        (b"garbage", "upstream_disconnected"),
    ],
)
async def test_a_stream_never_ends_without_an_error_or_its_end(
    fleet: Fleet, fake: FakeReplica, rest: bytes, code: str
) -> None:
    """A stream that breaks off ends with an error event after whole events, and has no [DONE]."""
    before_requests = len(fake.requests(CHAT))
    async with urls(answering(stream_head() + chunk(FIRST) + rest)) as (url,):
        with fleet.replicas(("hi", url), ("lo", fake.url)):
            answer = await fleet.ask(STREAM)
    first, error = events_in(answer.content)
    assert first["model"] == "smol"
    assert (error["error"]["code"], error["error"]["type"], error["error"]["param"]) == (code, "upstream_error", None)
    assert len(fake.requests(CHAT)) == before_requests
    assert await fleet.total("quantgate_requests_total", alias="smol", variant="hi", code=code)


async def test_an_engine_that_crashes_in_a_stream(fleet: Fleet) -> None:
    """The client gets an error event without the text of vLLM's own."""
    async with running_fake("--fake-crash-after-requests", "0", "--fake-tokens-per-second", "50") as fake:
        with fleet.replicas(("hi", fake.url)):
            *_, error = events_in((await fleet.ask(STREAM)).content)
    assert error["error"]["message"] == "a replica failed with status 500"
    assert error["error"]["code"] == "upstream_error"


async def test_a_failure_after_the_end(fleet: Fleet) -> None:
    """A connection that breaks after [DONE] does not make the answer incomplete."""
    before = await fleet.total("quantgate_requests_total", variant="mid", code="200")
    async with urls(answering(stream_head() + chunk(FIRST) + chunk(LAST) + chunk(DONE))) as (url,):
        with fleet.replicas(("mid", url)):
            answer = await fleet.ask(STREAM)
    assert answer.content == (FIRST + LAST).replace(b"m1", b"smol") + DONE
    assert await fleet.total("quantgate_requests_total", variant="mid", code="200") == before + 1


# What must not be carried over to another attempt, or to the next request


async def test_a_stream_that_has_started_is_not_retried(fleet: Fleet, fake: FakeReplica) -> None:
    """A replica that reports in the middle that it has no room has failed, as with any other error."""
    go = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head() + chunk(FIRST))
        await go.wait()
        await peer.say(chunk(event('{"error":{"message":"secret","code":503}}')) + chunk(b""))

    async with urls(behaviour) as (url,):
        with fleet.replicas(("hi", url), ("mid", fake.url)):
            async with fleet.client.stream("POST", CHAT, json=STREAM) as answer:
                pieces = answer.aiter_raw()
                assert await anext(pieces) == FIRST.replace(b"m1", b"smol")
                go.set()
                (error,) = events_in(b"".join([piece async for piece in pieces]))
    assert error["error"]["code"] == "overloaded"


async def test_an_error_ends_with_its_request(fleet: Fleet) -> None:
    """An error at the end of a reply leaves a connection that the next request uses, without the error."""
    go = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head() + chunk(FIRST))
        await go.wait()
        await peer.say(chunk(event('{"error":{"message":"secret","code":400}}')) + chunk(b""))
        await peer.request()
        for piece in (stream_head() + chunk(FIRST), chunk(LAST), chunk(DONE) + chunk(b"")):
            await peer.say(piece)
            await asyncio.sleep(0)
        await peer.left()

    async with urls(behaviour) as (url,):
        with fleet.replicas(("hi", url)):
            async with fleet.client.stream("POST", CHAT, json=STREAM) as answer:
                pieces = answer.aiter_raw()
                await anext(pieces)
                go.set()
                assert b'"error"' in b"".join([piece async for piece in pieces])
            assert (await fleet.ask(STREAM)).content == (FIRST + LAST).replace(b"m1", b"smol") + DONE


async def test_a_failure_without_another_replica_is_not_a_retry() -> None:
    """It takes nothing from the budget, and counts as no attempt."""
    retries = {"share": 0, "burst": 1}
    listen = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0"}
    async with running_gateway(deployment({"gateway": {**listen, "retries": retries}})) as fleet, urls(None) as (url,):
        with fleet.replicas(("hi", url)):
            assert [(await fleet.ask()).status_code for _ in range(3)] == [502] * 3
        assert await fleet.total("quantgate_retries_total") == 0
        assert await fleet.total("quantgate_retries_refused_total") == 0
        async with running_fake() as fake:
            with fleet.replicas(("hi", url), ("mid", fake.url)):
                assert [(await fleet.ask()).status_code for _ in range(2)] == [200, 502]
        assert await fleet.total("quantgate_retries_total", code="upstream_unreachable") == 1
        assert await fleet.total("quantgate_retries_refused_total", reason="budget") == 1


async def test_a_poisonous_request(fleet: Fleet, fake: FakeReplica) -> None:
    """A request that two replicas died of is not sent to a third."""
    before = await fleet.total("quantgate_retries_refused_total", reason="poison")
    async with urls(answering(b""), answering(b"")) as (first, second):
        with fleet.replicas(("hi", first), ("mid", second), ("lo", fake.url)):
            before_requests = len(fake.requests(CHAT))
            answer = await fleet.ask()
    assert (answer.status_code, error_of(answer)["code"]) == (502, "upstream_disconnected")
    assert len(fake.requests(CHAT)) == before_requests
    assert await fleet.total("quantgate_retries_refused_total", reason="poison") == before + 1


async def test_an_unregistered_status(fleet: Fleet) -> None:
    """A 4xx without a registered name is passed on."""
    async with urls(answering(whole(b'{"error":{"message":"odd"}}', "499 Odd"))) as (url,):
        with fleet.replicas(("hi", url)):
            answer = await fleet.ask()
    assert (answer.status_code, error_of(answer)["message"]) == (499, "odd")


async def test_rate_limit_headers(fake: FakeReplica) -> None:
    """They have what the key has left at the time of the answer."""
    keys = keys_in_force({"k": StoredKey(sha256=(digest("qg-k"),), requests_per_minute=5)})
    async with running_gateway(deployment(keys=keys)) as fleet:
        with fleet.replicas(("hi", fake.url)):
            answers = [await fleet.ask(headers={"authorization": "Bearer qg-k"}) for _ in range(2)]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["4", "3"]


@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "stream"])
async def test_a_request_that_waits_when_the_gateway_stops(streaming: bool) -> None:
    """It gets 503 with a retry hint when the time for running requests is up."""
    async with (
        httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as client,
        running_gateway(deployment()) as fleet,
    ):
        with fleet.replicas(("hi", unused_url()), state=State.STARTING):
            body = STREAM if streaming else HELLO
            task = asyncio.create_task(client.post(f"{fleet.url}{CHAT}", json=body))
            while not await fleet.total("quantgate_waiting"):
                pass
            await fleet.served.server.drain(0.1)
            answer = await task
    assert (answer.status_code, error_of(answer)["code"]) == (503, "draining")
    assert answer.headers["x-should-retry"] == "true"
