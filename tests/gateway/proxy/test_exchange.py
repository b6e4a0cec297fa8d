"""One request between a client and its replicas: what is passed on, what is retried, and which errors clients get."""

import asyncio
import json
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from gateway.keys import StoredKey, keys_in_force
from serving.replica import Replica, State
from tests.fakes.running import DEADLINE_SECONDS, HOST, FakeReplica, eventually, running_fake
from tests.gateway.fleet import (
    CHAT,
    CONFIG,
    HELLO,
    JSON,
    STREAM,
    TEXT,
    Fleet,
    deployment,
    error_of,
    events_in,
    running_gateway,
    text_of,
)
from tests.gateway.keys.test_keys import digest
from tests.gateway.wire import Behaviour, Peer, answering, chunk, connected, scripted, stream, stream_head, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROMPT: dict[str, Any] = {"model": "smol", "prompt": "hello there", "max_tokens": 5}
USAGE = {"stream_options": {"include_usage": True}}
ROUTING_HEADERS = ("variant", "precision", "replica", "attempts", "reason")
ANSWER = b'{"id":"c","model":"m1","choices":[]}'


def event(data: str) -> bytes:
    """One event of a stream."""
    return f"data: {data}\n\n".encode()


FIRST, SECOND = event('{"model":"m1","choices":[{}]}'), event('{"model":"m1","choices":[1]}')
LAST = event('{"model":"m1","choices":[{"finish_reason":"stop"}]}')
DONE = event("[DONE]")


def routing_headers(answer: httpx.Response) -> tuple[str | None, ...]:
    """The values of the routing headers."""
    return tuple(answer.headers.get(f"x-quantgate-{name}") for name in ROUTING_HEADERS)


def unused_url() -> str:
    """A url at which nothing listens."""
    with socket.create_server((HOST, 0)) as taken:
        return f"http://{HOST}:{taken.getsockname()[1]}"


@asynccontextmanager
async def urls(*behaviours: Behaviour | None) -> AsyncIterator[list[str]]:
    """Run replicas with these behaviours; None is a url at which nothing listens."""
    async with AsyncExitStack() as stack:
        yield [
            (await stack.enter_async_context(scripted(behaviour))).url if behaviour else unused_url()
            for behaviour in behaviours
        ]


async def ask_directly(fake: FakeReplica, body: dict[str, Any], path: str) -> bytes:
    """Send the same request to a replica, without a gateway."""
    async with httpx.AsyncClient(base_url=fake.url, timeout=DEADLINE_SECONDS, trust_env=False) as client:
        answer = await client.post(path, json={**body, "model": "m1"}, headers={"x-request-id": "r-1"})
        return answer.content


# What is passed on


@pytest.mark.parametrize(
    "path, body",
    [
        (CHAT, HELLO),
        (CHAT, {**HELLO, "n": 2, "max_tokens": 3}),
        (TEXT, PROMPT),
        (CHAT, {**STREAM, **USAGE}),
        (CHAT, {**STREAM, **USAGE, "n": 3, "max_tokens": 4}),
        (TEXT, {**PROMPT, "stream": True, **USAGE}),
    ],
)
async def test_an_answer_is_the_replicas_except_for_the_name(
    fleet: Fleet, fake: FakeReplica, path: str, body: dict[str, Any]
) -> None:
    """Every byte is the replica's, unary or streamed, except that the model has the name that the client sent."""
    with fleet.replicas(("hi", fake.url)):
        answer = await fleet.ask(body, {"x-request-id": "r-1"}, path)
    direct = (await ask_directly(fake, body, path)).replace(b'"model":"m1"', b'"model":"smol"')
    without_times = [re.sub(rb'"created":\d+', b'"created":0', each) for each in (answer.content, direct)]
    assert without_times[0] == without_times[1]
    assert b'"model":"smol"' in answer.content
    assert routing_headers(answer) == ("hi", "bf16", "hi-0", "1", "preferred")
    assert answer.headers["x-request-id"] == "r-1"
    streamed = "text/event-stream; charset=utf-8" if body.get("stream") else "application/json"
    assert answer.headers["content-type"] == streamed


async def test_events_are_passed_on_as_they_arrive(fleet: Fleet) -> None:
    """The client has the first tokens while the replica generates the next ones."""
    async with running_fake("--fake-stall-after-tokens", "2") as fake:
        with fleet.replicas(("hi", fake.url)):
            async with fleet.client.stream("POST", CHAT, json=STREAM) as answer:
                lines = answer.aiter_lines()
                early = [await anext(lines) for _ in range(6)]
                assert [json.loads(line[6:])["choices"][0]["delta"] for line in early[::2]] == [
                    {"role": "assistant", "content": ""},
                    {"content": "m1"},
                    {"content": " heard"},
                ]
                assert fake.endings() == []
                assert fleet.registry.snapshot()[0].in_flight == 1
                assert await fleet.total("quantgate_requests_in_flight", endpoint="chat.completions") == 1
                assert await fleet.total("quantgate_replica_in_flight", replica="hi-0", variant="hi") == 1
                fake.resume()
                late = [line async for line in lines if line]
        assert late[-1] == "data: [DONE]"
        assert fake.endings() == [{"event": "finished", "tokens": 16}]


async def test_a_stream_in_small_pieces(fleet: Fleet, fake: FakeReplica) -> None:
    """Events and characters that arrive in pieces are passed on whole."""
    async with running_fake("--fake-split-bytes", "3") as splitting:
        with fleet.replicas(("hi", splitting.url)):
            answer = await fleet.ask({**STREAM, **USAGE})
    events = events_in(answer.content)
    assert "café 汉字" in text_of(events)
    assert text_of(events) == text_of(events_in(await ask_directly(fake, {**STREAM, **USAGE}, CHAT)))
    assert {each["model"] for each in events[:-1]} == {"smol"}


async def test_forms_of_a_stream(fleet: Fleet) -> None:
    """Comments are kept, CRLF becomes LF, events without data are dropped, and an event may be longer than one read."""
    long = event('{"model":"m1","choices":["' + "é" * 400_000 + '"]}')
    sent = stream(b": hello\r\n\r\n", FIRST.replace(b"\n", b"\r\n"), b"event: ping\n\n", long, LAST, b": bye\n\n", DONE)
    async with urls(answering(sent, close=False)) as (url,):
        with fleet.replicas(("hi", url)):
            answer = await fleet.ask(STREAM)
    assert answer.content == b": hello\n\n" + (FIRST + long + LAST).replace(b"m1", b"smol") + b": bye\n\n" + DONE


async def test_a_stream_that_ends_with_its_connection(fleet: Fleet) -> None:
    """A reply may have neither a length nor chunks."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: Text/Event-Stream\r\n\r\n"
    async with urls(answering(head + FIRST + LAST + DONE)) as (url,):
        with fleet.replicas(("hi", url)):
            answer = await fleet.ask(STREAM)
    assert answer.content == (FIRST + LAST).replace(b"m1", b"smol") + DONE


@pytest.mark.parametrize("stream_options", [None, {"include_usage": False}, {"include_usage": True}])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_usage_in_a_stream(
    fleet: Fleet, fake: FakeReplica, path: str, stream_options: dict[str, bool] | None
) -> None:
    """A client gets one usage chunk if it asked for it, else none; tokens are metered in both cases."""
    body = {
        **(STREAM if path == CHAT else {**PROMPT, "stream": True}),
        "max_tokens": 5,
        "stream_options": stream_options,
    }
    served = {"alias": "smol", "variant": "lo", "precision": "int4"}
    before = [await fleet.total("quantgate_tokens_total", kind=kind, **served) for kind in ("prompt", "completion")]
    with fleet.replicas(("lo", fake.url)):
        events = events_in((await fleet.ask(body, path=path)).content)
    with_usage = [each for each in events if each != "[DONE]" and "usage" in each]
    wants_usage = stream_options is not None and stream_options["include_usage"]
    assert [each["choices"] for each in with_usage] == ([[]] if wants_usage else [])
    after = [await fleet.total("quantgate_tokens_total", kind=kind, **served) for kind in ("prompt", "completion")]
    assert after[1] - before[1] == 5
    assert after[0] - before[0] == (61 if path == CHAT else len(PROMPT["prompt"]))


async def test_reasoning_is_passed_on_and_metered(fleet: Fleet) -> None:
    """Reasoning stays in the replica's field, and is counted separately."""
    async with running_fake("--fake-tokens", "5", "--fake-reasoning-tokens", "2") as fake:
        before = await fleet.total("quantgate_tokens_total", kind="reasoning")
        with fleet.replicas(("hi", fake.url)):
            message = (await fleet.ask()).json()["choices"][0]["message"]
            events = events_in((await fleet.ask(STREAM)).content)
        assert (message["reasoning"], message["content"]) == ("m1 heard", " hello there café")
        assert message["reasoning_content"] == message["reasoning"]
        assert events[1]["choices"][0]["delta"] == {"reasoning": "m1", "reasoning_content": "m1"}
        assert await fleet.total("quantgate_tokens_total", kind="reasoning") == before + 4


async def test_the_request_that_a_replica_gets(fleet: Fleet) -> None:
    """Its own model name, the client's other fields byte for byte, and of the client's headers only the request id."""
    requests: list[bytes] = []

    async def behaviour(peer: Peer) -> None:
        requests.append(await peer.request())
        await peer.say(whole(ANSWER))

    body = (
        '{"seed": 123456789012345678901234567890, "temperature": 1.0, "café": "\\u00e9 汉",'
        '"model": "smol", "provider": {"quantizations": ["bf16"], "order": ["x"]}, "top_p":1E-1,'
        '"chat_template_kwargs": {"b": 1, "a": [1 , 2]}, "messages": []}'
    )
    headers = {
        "x-request-id": "r-7",
        "authorization": "Bearer client-secret",
        "cookie": "a=b",
        "x-api-key": "client-secret",
        "x-stainless-lang": "python",
        "x-quantgate-precision": "bf16",
        "x-quantgate-floor": "top1_agreement=0.5",
    }
    async with urls(behaviour) as (url,):
        with fleet.replicas(("hi", url)):
            assert (await fleet.ask(body.encode(), headers)).content == ANSWER.replace(b"m1", b"smol")
    sent = (
        '{"seed":123456789012345678901234567890,"temperature":1.0,"café":"\\u00e9 汉",'
        '"model":"m1","top_p":1E-1,"chat_template_kwargs":{"b": 1, "a": [1 , 2]},"messages":[]}'
    ).encode()
    assert requests == [
        b"POST /v1/chat/completions HTTP/1.1\r\n"
        b"host: " + url.removeprefix("http://").encode() + b"\r\n"
        b"content-type: application/json\r\n"
        b"content-length: %d\r\n" % len(sent) + b"x-request-id: r-7\r\n"
        b"\r\n" + sent
    ]


async def test_the_credential_of_a_replica(fleet: Fleet) -> None:
    """A replica gets the key that is configured for it, and not the client's."""
    async with running_fake(env={"VLLM_API_KEY": "secret"}) as fake:
        fleet.registry.put(Replica("hi-0", "hi", "bf16", fake.url, "m1", api_key="secret"), State.READY)
        try:
            assert (await fleet.ask(headers={"authorization": "Bearer other"})).status_code == 200
        finally:
            fleet.registry.remove("hi-0")
        assert fake.requests(CHAT)[0]["headers"]["authorization"] == "Bearer secret"


# Which replica answers


@pytest.mark.parametrize(
    "body, headers, expected",
    [
        ({}, {}, ("hi", "bf16", "preferred")),
        ({"model": "lo"}, {}, ("lo", "int4", "pinned")),
        ({"model": "team/small"}, {}, ("lo", "int4", "preferred")),
        ({"model": "strict"}, {}, ("hi", "bf16", "preferred")),
        ({}, {"x-quantgate-precision": "int8,int4"}, ("mid", "int8", "floor")),
        ({"provider": {"quantizations": ["int4"]}}, {}, ("lo", "int4", "floor")),
        ({}, {"x-quantgate-floor": "top1_agreement=0.98"}, ("hi", "bf16", "preferred")),
        ({"model": "strict"}, {"x-quantgate-precision": "int8,int4"}, ("mid", "int8", "floor")),
    ],
)
async def test_the_routing_headers(
    fleet: Fleet, fake: FakeReplica, body: dict[str, Any], headers: dict[str, str], expected: tuple[str, str, str]
) -> None:
    """Unary and streamed answers name the variant, its precision and the reason; the model has the client's name."""
    with fleet.replicas(*((variant, fake.url) for variant in ("hi", "mid", "lo"))):
        answers = [await fleet.ask({**shape, **body}, headers) for shape in (HELLO, STREAM)]
    name = {**HELLO, **body}["model"]
    for answer in answers:
        variant, precision, replica, attempts, reason = routing_headers(answer)
        assert (variant, precision, reason, attempts) == (*expected, "1")
        assert replica is not None
        assert replica.startswith(f"{variant}-")
        assert f'"model":"{name}"' in answer.text
        assert '"model":"m1"' not in answer.text


@pytest.mark.parametrize(
    "body, headers",
    [
        ({}, {"x-quantgate-floor": "kl_mean=0"}),
        ({"model": "strict"}, {"x-quantgate-precision": "int4"}),
        ({"model": "hopeless"}, {}),
        ({"model": "lo"}, {"x-quantgate-floor": "top1_agreement=0.99"}),
        ({"model": "odd"}, {"x-quantgate-floor": "top1_agreement=0.01"}),
        ({"provider": {"quantizations": ["fp4"]}}, {}),
    ],
)
async def test_a_floor_is_never_missed(
    fleet: Fleet, fake: FakeReplica, body: dict[str, Any], headers: dict[str, str]
) -> None:
    """No replica below the floor answers, even if no other is ready; the refusal is counted."""
    before = await fleet.total("quantgate_floor_rejections_total")
    before_requests = len(fake.requests(CHAT))
    request = {**HELLO, **body}
    with fleet.replicas(("lo", fake.url), ("odd", fake.url)):
        answer = await fleet.ask(request, headers)
    error = error_of(answer)
    if "kl_mean" in str(headers):
        # `hi` satisfies the floor, but has no replica.
        assert (answer.status_code, error["code"]) == (503, "no_ready_replica")
    else:
        assert (answer.status_code, error["code"], error["param"]) == (503, "quality_floor_unmet", "model")
        assert await fleet.total("quantgate_floor_rejections_total", alias=request["model"])
        assert await fleet.total("quantgate_floor_rejections_total") == before + 1
    assert len(fake.requests(CHAT)) == before_requests


async def test_load_is_spread(fleet: Fleet) -> None:
    """Each request goes to the replica with fewer requests in flight."""
    async with (
        running_fake("--fake-stall-before-first-byte") as first,
        running_fake("--fake-stall-before-first-byte") as second,
    ):
        with fleet.replicas(("hi", first.url), ("hi", second.url)):
            tasks = [asyncio.create_task(fleet.ask()) for _ in range(4)]
            for fake in (first, second):
                await fake.requested(CHAT, 2)
            assert [status.in_flight for status in fleet.registry.snapshot()] == [2, 2]
            first.resume()
            second.resume()
            assert [(await task).status_code for task in tasks] == [200] * 4


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
    assert (answer.status_code, error["param"], error["code"]) == (status, param, "400")
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


# Clients that leave


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_client_that_leaves_before_the_first_byte(fleet: Fleet, streaming: bool) -> None:
    """The replica sees it at once, unary or streamed, and nothing stays in flight."""
    before = await fleet.total("quantgate_requests_total", code="499", variant="hi")
    async with running_fake("--fake-stall-before-first-byte") as fake:
        with fleet.replicas(("hi", fake.url)):
            task = asyncio.create_task(fleet.ask(STREAM if streaming else HELLO))
            await fake.requested(CHAT)
            task.cancel()
            assert await fake.ended() == [{"event": "aborted", "tokens": 0}]
            await fleet.at_rest()
    assert await fleet.total("quantgate_requests_total", code="499", variant="hi") == before + 1


async def test_a_client_that_leaves_in_the_middle(fleet: Fleet) -> None:
    """The replica stops generating."""
    async with running_fake("--fake-stall-after-tokens", "2") as fake:
        with fleet.replicas(("hi", fake.url)):
            async with fleet.client.stream("POST", CHAT, json=STREAM) as answer:
                async for line in answer.aiter_lines():
                    if "heard" in line:
                        break
            assert await fake.ended() == [{"event": "aborted", "tokens": 2}]
            await fleet.at_rest()


async def test_a_client_that_leaves_after_the_end(fleet: Fleet) -> None:
    """SDKs close as soon as they have read [DONE]: that is a complete answer, and not a 499."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head() + chunk(LAST + DONE))
        await peer.left()  # the end of the body is never sent

    before = await fleet.total("quantgate_requests_total", code="200", variant="hi")
    async with scripted(behaviour) as replica:
        with fleet.replicas(("hi", replica.url)):
            async with fleet.client.stream("POST", CHAT, json=STREAM) as answer:
                async for line in answer.aiter_lines():
                    if "[DONE]" in line:
                        break
            await fleet.at_rest()
    assert await fleet.total("quantgate_requests_total", code="200", variant="hi") == before + 1


async def test_a_client_that_leaves_while_it_waits(fleet: Fleet) -> None:
    """It leaves only a count."""
    before = await fleet.total("quantgate_requests_total", code="499", alias="smol", variant="none")
    with fleet.replicas(("hi", unused_url()), state=State.STARTING):
        task = asyncio.create_task(fleet.ask())
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not await fleet.total("quantgate_requests_in_flight"):
                pass
        task.cancel()
        await fleet.at_rest()
    assert await fleet.total("quantgate_requests_total", code="499", alias="smol", variant="none") == before + 1


async def test_a_client_that_does_not_read(fleet: Fleet) -> None:
    """A slow client slows its replica down, and does not fill memory; when it leaves, its stream ends."""
    sent, gone = 0, asyncio.Event()
    piece = event('{"model":"m1","choices":["' + "x" * 2**16 + '"]}')

    async def behaviour(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.say(stream_head())
        try:
            while sent < 500 * 2**20:
                await peer.say(chunk(piece))
                sent += len(piece)
        finally:
            gone.set()

    async with urls(behaviour) as (url,):
        with fleet.replicas(("hi", url)):
            async with connected(fleet.url) as peer:
                await peer.say(post(STREAM))
                await peer.read_until(b"\r\n\r\n")
                async with asyncio.timeout(DEADLINE_SECONDS):
                    before = -1
                    while before != sent:
                        before = sent
                        await asyncio.sleep(0.1)
                assert sent < 100 * 2**20
            async with asyncio.timeout(DEADLINE_SECONDS):
                await gone.wait()
            await fleet.at_rest()


def post(body: dict[str, Any], path: str = CHAT) -> bytes:
    """Encode a request."""
    content = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {JSON['content-type']}\r\n".encode() + (
        b"content-length: %d\r\n\r\n" % len(content) + content
    )


# Waiting


async def test_a_request_waits_for_a_replica_that_starts(fleet: Fleet, fake: FakeReplica) -> None:
    """It is answered as soon as the replica is ready."""
    for state in (State.STARTING, State.WARMING):
        with fleet.replicas(("hi", fake.url), state=state):
            task = asyncio.create_task(fleet.ask())
            async with asyncio.timeout(DEADLINE_SECONDS):
                while not await fleet.total("quantgate_requests_in_flight"):
                    pass
            fleet.registry.move("hi-0", State.READY)
            answer = await task
        assert (answer.status_code, routing_headers(answer)[-2:]) == (200, ("1", "preferred"))


async def test_waiting_has_an_end() -> None:
    """After `queue_seconds` the client gets 503 with a retry-after, and the wait is counted."""
    settings = {**CONFIG["gateway"], "limits": {"queue_seconds": 0.05}}
    async with running_gateway(deployment({"gateway": settings})) as fleet:
        with fleet.replicas(("hi", unused_url()), state=State.STARTING):
            answer = await fleet.ask()
        assert await fleet.total("quantgate_queue_seconds_count", alias="smol") == 1
        assert await fleet.total("quantgate_requests_total", alias="smol", variant="none", code="503") == 1
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (503, "no_ready_replica")
    assert error["message"] == "no replica of 'smol' became ready in time"
    assert int(answer.headers["retry-after"]) > 0
    assert routing_headers(answer) == (None,) * 5


@pytest.mark.parametrize("state", [State.FAILED, State.DRAINING, State.STOPPED, State.STOPPING])
async def test_no_replica_may_become_ready(fleet: Fleet, state: State) -> None:
    """The request is refused at once."""
    with fleet.replicas(("hi", unused_url()), ("lo", unused_url()), state=state):
        answer = await fleet.ask()
    assert (answer.status_code, error_of(answer)["message"]) == (503, "no replica of 'smol' is ready")
    assert "retry-after" in answer.headers


async def test_a_failed_request_does_not_wait(fleet: Fleet) -> None:
    """When all ready replicas have failed it, the request does not wait for one that starts."""
    with fleet.replicas(("hi", unused_url())):
        fleet.registry.put(Replica("lo-9", "lo", "int4", unused_url(), "m1"), State.STARTING)
        try:
            answer = await fleet.ask()
        finally:
            fleet.registry.remove("lo-9")
    assert (answer.status_code, error_of(answer)["code"]) == (502, "upstream_unreachable")


async def test_a_request_with_a_floor_waits(fleet: Fleet, fake: FakeReplica) -> None:
    """A ready replica that is not permitted does not end the wait for one that is."""
    with fleet.replicas(("lo", fake.url)):
        fleet.registry.put(Replica("hi-9", "hi", "bf16", fake.url, "m1"), State.STARTING)
        task = asyncio.create_task(fleet.ask(headers={"x-quantgate-precision": "bf16"}))
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while not await fleet.total("quantgate_requests_in_flight"):
                    pass
            fleet.registry.move("hi-9", State.READY)
            answer = await task
        finally:
            fleet.registry.remove("hi-9")
    assert routing_headers(answer) == ("hi", "bf16", "hi-9", "1", "preferred")


async def test_the_replica_aborts_the_requests_of_clients_that_left(fleet: Fleet) -> None:
    """Each of them ends there, and nothing stays in flight."""
    async with running_fake("--fake-stall-after-tokens", "1") as fake:
        with fleet.replicas(("hi", fake.url)):
            tasks = [asyncio.create_task(fleet.ask(STREAM)) for _ in range(5)]
            await fake.requested(CHAT, 5)
            for task in tasks:
                task.cancel()
            assert len(await eventually(lambda: ends if len(ends := fake.endings()) == 5 else None)) == 5
            await fleet.at_rest()


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
