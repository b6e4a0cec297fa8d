"""One request between a client and its replicas: what passes, what is asked for elsewhere, what is told."""

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
DISCLOSED = ("variant", "precision", "replica", "attempts", "reason")
ANSWER = b'{"id":"c","model":"m1","choices":[]}'


def event(data: str) -> bytes:
    """One event of a stream."""
    return f"data: {data}\n\n".encode()


FIRST, SECOND = event('{"model":"m1","choices":[{}]}'), event('{"model":"m1","choices":[1]}')
LAST = event('{"model":"m1","choices":[{"finish_reason":"stop"}]}')
DONE = event("[DONE]")


def disclosed(answer: httpx.Response) -> tuple[str | None, ...]:
    """Who answered, and why: the headers that tell."""
    return tuple(answer.headers.get(f"x-quantgate-{name}") for name in DISCLOSED)


def refusing() -> str:
    """An address at which nobody listens."""
    with socket.create_server((HOST, 0)) as taken:
        return f"http://{HOST}:{taken.getsockname()[1]}"


@asynccontextmanager
async def urls(*behaviours: Behaviour | None) -> AsyncIterator[list[str]]:
    """Replicas with these behaviours; None is one that takes no connection."""
    async with AsyncExitStack() as stack:
        yield [
            (await stack.enter_async_context(scripted(behaviour))).url if behaviour else refusing()
            for behaviour in behaviours
        ]


async def asked_directly(fake: FakeReplica, body: dict[str, Any], path: str) -> bytes:
    """What a replica says to the same request without a gateway."""
    async with httpx.AsyncClient(base_url=fake.url, timeout=DEADLINE_SECONDS, trust_env=False) as client:
        answer = await client.post(path, json={**body, "model": "m1"}, headers={"x-request-id": "r-1"})
        return answer.content


# What passes


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
async def test_an_answer_is_the_replicas_own_but_for_the_name(
    fleet: Fleet, fake: FakeReplica, path: str, body: dict[str, Any]
) -> None:
    """Whole or streamed, every byte is what the replica says itself, but the asked model's name for its own."""
    with fleet.replicas(("hi", fake.url)):
        answer = await fleet.ask(body, {"x-request-id": "r-1"}, path)
    direct = (await asked_directly(fake, body, path)).replace(b'"model":"m1"', b'"model":"smol"')
    timeless = [re.sub(rb'"created":\d+', b'"created":0', each) for each in (answer.content, direct)]
    assert timeless[0] == timeless[1]
    assert b'"model":"smol"' in answer.content
    assert disclosed(answer) == ("hi", "bf16", "hi-0", "1", "preferred")
    assert answer.headers["x-request-id"] == "r-1"
    streamed = "text/event-stream; charset=utf-8" if body.get("stream") else "application/json"
    assert answer.headers["content-type"] == streamed


async def test_chunks_pass_as_they_arrive(fleet: Fleet) -> None:
    """The first tokens are at the client while the replica still thinks about the next ones."""
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


async def test_a_stream_in_splinters(fleet: Fleet, fake: FakeReplica) -> None:
    """Events and characters that arrive in pieces come out whole."""
    async with running_fake("--fake-split-bytes", "3") as splitting:
        with fleet.replicas(("hi", splitting.url)):
            answer = await fleet.ask({**STREAM, **USAGE})
    events = events_in(answer.content)
    assert "café 汉字" in text_of(events)
    assert text_of(events) == text_of(events_in(await asked_directly(fake, {**STREAM, **USAGE}, CHAT)))
    assert {each["model"] for each in events[:-1]} == {"smol"}


async def test_forms_of_a_stream(fleet: Fleet) -> None:
    """Comments stay, CRLF becomes LF, events without data go, and an event may be longer than one read."""
    long = event('{"model":"m1","choices":["' + "é" * 400_000 + '"]}')
    said = stream(b": hello\r\n\r\n", FIRST.replace(b"\n", b"\r\n"), b"event: ping\n\n", long, LAST, b": bye\n\n", DONE)
    async with urls(answering(said, close=False)) as (url,):
        with fleet.replicas(("hi", url)):
            answer = await fleet.ask(STREAM)
    assert answer.content == b": hello\n\n" + (FIRST + long + LAST).replace(b"m1", b"smol") + b": bye\n\n" + DONE


async def test_a_stream_that_ends_with_its_connection(fleet: Fleet) -> None:
    """A replica that neither counts nor chunks is understood, too."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: Text/Event-Stream\r\n\r\n"
    async with urls(answering(head + FIRST + LAST + DONE)) as (url,):
        with fleet.replicas(("hi", url)):
            answer = await fleet.ask(STREAM)
    assert answer.content == (FIRST + LAST).replace(b"m1", b"smol") + DONE


@pytest.mark.parametrize("wish", [None, {"include_usage": False}, {"include_usage": True}])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_usage_in_a_stream(fleet: Fleet, fake: FakeReplica, path: str, wish: dict[str, bool] | None) -> None:
    """One usage chunk for who asked for it, none for who didn't; tokens are metered either way."""
    body = {**(STREAM if path == CHAT else {**PROMPT, "stream": True}), "max_tokens": 5, "stream_options": wish}
    served = {"alias": "smol", "variant": "lo", "precision": "int4"}
    before = [await fleet.total("quantgate_tokens_total", kind=kind, **served) for kind in ("prompt", "completion")]
    with fleet.replicas(("lo", fake.url)):
        events = events_in((await fleet.ask(body, path=path)).content)
    counted = [each for each in events if each != "[DONE]" and "usage" in each]
    assert [each["choices"] for each in counted] == ([[]] if wish and wish["include_usage"] else [])
    after = [await fleet.total("quantgate_tokens_total", kind=kind, **served) for kind in ("prompt", "completion")]
    assert after[1] - before[1] == 5
    assert after[0] - before[0] == (61 if path == CHAT else len(PROMPT["prompt"]))


async def test_reasoning_passes_and_is_metered(fleet: Fleet) -> None:
    """Reasoning stays where the replica puts it, and is counted apart."""
    async with running_fake("--fake-tokens", "5", "--fake-reasoning-tokens", "2") as fake:
        before = await fleet.total("quantgate_tokens_total", kind="reasoning")
        with fleet.replicas(("hi", fake.url)):
            message = (await fleet.ask()).json()["choices"][0]["message"]
            events = events_in((await fleet.ask(STREAM)).content)
        assert (message["reasoning"], message["content"]) == ("m1 heard", " hello there café")
        assert message["reasoning_content"] == message["reasoning"]
        assert events[1]["choices"][0]["delta"] == {"reasoning": "m1", "reasoning_content": "m1"}
        assert await fleet.total("quantgate_tokens_total", kind="reasoning") == before + 4


async def test_what_a_replica_gets(fleet: Fleet) -> None:
    """Its own model name, the client's other fields byte for byte, and of the client's headers the request id alone."""
    heard: list[bytes] = []

    async def behaviour(peer: Peer) -> None:
        heard.append(await peer.request())
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
    assert heard == [
        b"POST /v1/chat/completions HTTP/1.1\r\n"
        b"host: " + url.removeprefix("http://").encode() + b"\r\n"
        b"content-type: application/json\r\n"
        b"content-length: %d\r\n" % len(sent) + b"x-request-id: r-7\r\n"
        b"\r\n" + sent
    ]


async def test_a_replicas_own_credential(fleet: Fleet) -> None:
    """A replica that wants a key gets the one that is configured for it."""
    async with running_fake(env={"VLLM_API_KEY": "secret"}) as fake:
        fleet.registry.put(Replica("hi-0", "hi", "bf16", fake.url, "m1", api_key="secret"), State.READY)
        try:
            assert (await fleet.ask(headers={"authorization": "Bearer other"})).status_code == 200
        finally:
            fleet.registry.remove("hi-0")
        assert fake.requests(CHAT)[0]["headers"]["authorization"] == "Bearer secret"


# Who answers


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
async def test_the_choice_is_disclosed(
    fleet: Fleet, fake: FakeReplica, body: dict[str, Any], headers: dict[str, str], expected: tuple[str, str, str]
) -> None:
    """Whole and streamed answers say which variant answers, in which precision, and why; the asked name comes back."""
    with fleet.replicas(*((variant, fake.url) for variant in ("hi", "mid", "lo"))):
        answers = [await fleet.ask({**shape, **body}, headers) for shape in (HELLO, STREAM)]
    name = {**HELLO, **body}["model"]
    for answer in answers:
        variant, precision, replica, attempts, reason = disclosed(answer)
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
async def test_a_floor_is_never_breached(
    fleet: Fleet, fake: FakeReplica, body: dict[str, Any], headers: dict[str, str]
) -> None:
    """Replicas that could answer, but not well enough, don't; the refusal is counted."""
    before = await fleet.total("quantgate_floor_rejections_total")
    asked = len(fake.requests(CHAT))
    floored = {**HELLO, **body}
    with fleet.replicas(("lo", fake.url), ("odd", fake.url)):
        answer = await fleet.ask(floored, headers)
    error = error_of(answer)
    if "kl_mean" in str(headers):
        # `hi` is good enough, but not there.
        assert (answer.status_code, error["code"]) == (503, "no_ready_replica")
    else:
        assert (answer.status_code, error["code"], error["param"]) == (503, "quality_floor_unmet", "model")
        assert await fleet.total("quantgate_floor_rejections_total", alias=floored["model"])
        assert await fleet.total("quantgate_floor_rejections_total") == before + 1
    assert len(fake.requests(CHAT)) == asked


async def test_load_is_spread(fleet: Fleet) -> None:
    """While one replica is busy, the next request goes to the other; what has ended counts no more."""
    async with (
        running_fake("--fake-stall-before-first-byte") as first,
        running_fake("--fake-stall-before-first-byte") as second,
    ):
        with fleet.replicas(("hi", first.url), ("hi", second.url)):
            asking = [asyncio.create_task(fleet.ask()) for _ in range(4)]
            for fake in (first, second):
                await fake.requested(CHAT, 2)
            assert [status.in_flight for status in fleet.registry.snapshot()] == [2, 2]
            first.resume()
            second.resume()
            assert [(await each).status_code for each in asking] == [200] * 4


# Failing over

HTML = b"<html><h1>502 Bad Gateway</h1> nginx</html>"
DEAD = b'{"error":{"message":"EngineCore died at /srv/secret","type":"InternalServerError","param":null,"code":500}}'
NO_MODEL = b'{"error":{"message":"The model `m1` does not exist.","type":"NotFoundError","param":"model","code":404}}'
EMPTY_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 0\r\n\r\n"


def failing(*, streaming: bool) -> dict[str, Behaviour | None]:
    """Ways to fail before a client has seen anything."""
    return {
        "takes no connection": None,
        "closes without a byte": answering(b""),
        "closes before its headers end": answering(b"HTTP/1.1 200 OK\r\ncontent-type: text"),
        "closes in the middle of its answer": answering(whole(ANSWER)[:-3] if not streaming else stream_head()),
        "speaks no HTTP": answering(b"SSH-2.0-OpenSSH\r\n"),
        "is busy": answering(whole(b'{"error":{"message":"busy"}}', "503 Busy")),
        "fails": answering(whole(DEAD, "500 Internal Server Error")),
        "fails without a word": answering(whole(b"", "500 Internal Server Error")),
        "is behind a broken proxy": answering(whole(HTML, "502 Bad Gateway", "text/html")),
        "refuses our credential": answering(whole(b'{"error":"Unauthorized"}', "401 Unauthorized")),
        "has another model": answering(whole(NO_MODEL, "404 Not Found")),
        "sends us elsewhere": answering(whole(b"", "307 Temporary Redirect", extra="location: /\r\n")),
        "has nothing to say": answering(whole(b"") if not streaming else EMPTY_STREAM),
        "says something else": answering(whole(b"[1]") if not streaming else stream(event("")[:-1])),
        "answers in the other form": answering(whole(ANSWER) if streaming else stream(FIRST, DONE)),
        "begins with an error": answering(stream(event(DEAD.decode()), DONE)),
    }


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("how", failing(streaming=False))
async def test_another_replica_answers(fleet: Fleet, fake: FakeReplica, how: str, streaming: bool) -> None:
    """As long as the client has seen nothing, a failure is mended behind its back, on a lower rung if need be."""
    before = await fleet.total("quantgate_retries_total", alias="smol")
    async with urls(failing(streaming=streaming)[how]) as (url,):
        with fleet.replicas(("hi", url), ("lo", fake.url)):
            answer = await fleet.ask(STREAM if streaming else HELLO)
    assert answer.status_code == 200
    reason = "spill" if how == "is busy" else "fallback"
    assert disclosed(answer) == ("lo", "int4", "lo-1", "2", reason)
    assert b"m1 heard" in answer.content if not streaming else text_of(events_in(answer.content))
    assert await fleet.total("quantgate_retries_total", alias="smol") == before + 1


async def test_another_replica_of_the_same_rung(fleet: Fleet, fake: FakeReplica) -> None:
    """A failure is no reason for a lower precision, and the two replicas of a rung still take turns."""
    async with urls(answering(whole(DEAD, "500 No"))) as (url,):
        seen: Counter[tuple[str | None, ...]] = Counter()
        with fleet.replicas(("hi", url), ("hi", fake.url), ("lo", fake.url)):
            for _ in range(6):
                seen[disclosed(await fleet.ask())] += 1
    assert seen == {("hi", "bf16", "hi-1", "1", "preferred"): 3, ("hi", "bf16", "hi-1", "2", "preferred"): 3}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "how, status, code",
    [
        ("takes no connection", 502, "upstream_unreachable"),
        ("closes without a byte", 502, "upstream_disconnected"),
        ("fails", 502, "upstream_error"),
        ("is behind a broken proxy", 502, "upstream_error"),
        ("refuses our credential", 502, "upstream_misconfigured"),
        ("says something else", 502, None),
        ("begins with an error", 502, None),
    ],
)
async def test_when_all_fail(fleet: Fleet, how: str, status: int, code: str | None, streaming: bool) -> None:
    """One error in OpenAI's shape that says who was tried last, and nothing of what the replicas said."""
    behaviour = failing(streaming=streaming)[how]
    async with urls(behaviour, behaviour) as (first, second):
        with fleet.replicas(("hi", first), ("lo", second)):
            answer = await fleet.ask(STREAM if streaming else HELLO)
    error = error_of(answer)
    assert answer.status_code == status
    assert error["code"] == code or code is None
    assert disclosed(answer) == ("lo", "int4", "lo-1", "2", "fallback")
    for word in ("secret", "nginx", "Unauthorized", "127.0.0.1"):
        assert word not in answer.text
    assert "retry-after" not in answer.headers


async def test_when_all_are_busy() -> None:
    """Who finds every replica full waits in line, and is told when to come back when the time is up."""
    impatient = {**CONFIG["gateway"], "limits": {"queue_seconds": 0.3}}
    busy = failing(streaming=False)["is busy"]
    async with running_gateway(deployment({"gateway": impatient})) as fleet, urls(busy, busy) as (first, second):
        with fleet.replicas(("hi", first), ("lo", second)):
            answer = await fleet.ask()
        assert (answer.status_code, error_of(answer)["code"]) == (429, "queue_timeout")
        assert 0 < int(answer.headers["retry-after"]) <= 120
        assert answer.headers["x-should-retry"] == "true"
        assert await fleet.total("quantgate_replica_breaker", state="open") == 0, "to be full is no failure"


async def test_three_attempts_are_enough(fleet: Fleet, fake: FakeReplica) -> None:
    """A request that three replicas fail on is not tried on a fourth."""
    asked = len(fake.requests(CHAT))
    async with urls(*[answering(whole(DEAD, "500 No"))] * 3) as found:
        with fleet.replicas(*(("hi", url) for url in found), ("lo", fake.url)):
            answer = await fleet.ask()
    assert (answer.status_code, error_of(answer)["code"]) == (502, "upstream_error")
    assert answer.headers["x-quantgate-attempts"] == "3"
    assert len(fake.requests(CHAT)) == asked


@pytest.mark.parametrize(
    "changes, status, param, words",
    [
        ({"max_tokens": "x"}, 400, "body.max_tokens", "valid integer"),
        ({"messages": None}, 400, "body.messages", "Field required"),
        ({"max_tokens": 10**9}, 400, "max_tokens", "cannot be greater than max_model_len"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_clients_mistake_is_not_tried_twice(
    fleet: Fleet, fake: FakeReplica, changes: dict[str, Any], status: int, param: str, words: str, streaming: bool
) -> None:
    """What one engine refuses the next one would refuse, too: its words reach the client, with a string code."""
    asked = len(fake.requests(CHAT))
    with fleet.replicas(("hi", fake.url), ("lo", fake.url)):
        answer = await fleet.ask({**HELLO, "stream": streaming, **changes})
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (status, param, "400")
    assert words in error["message"]
    assert disclosed(answer) == ("hi", "bf16", "hi-0", "1", "preferred")
    assert len(fake.requests(CHAT)) == asked + 1


async def test_a_mistake_that_is_told_inside_a_stream(fleet: Fleet, fake: FakeReplica) -> None:
    """An engine that says 200 and then refuses: nothing was passed on yet, so the client gets the real status."""
    refused = event('{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}')
    async with urls(answering(stream(refused, DONE))) as (url,):
        with fleet.replicas(("hi", url), ("lo", fake.url)):
            answer = await fleet.ask(STREAM)
    assert (answer.status_code, error_of(answer)["message"]) == (400, "too long")


# Failing after the first byte


@pytest.mark.parametrize(
    "rest, code",
    [
        (b"", "upstream_disconnected"),
        (chunk(SECOND[:-7]), "upstream_disconnected"),
        (chunk(b""), "upstream_disconnected"),
        (b"garbage", "upstream_disconnected"),
    ],
)
async def test_a_stream_is_never_cut_in_silence(fleet: Fleet, fake: FakeReplica, rest: bytes, code: str) -> None:
    """Whatever ends a stream before its end, the client gets an error event behind whole events, and no end."""
    asked = len(fake.requests(CHAT))
    async with urls(answering(stream_head() + chunk(FIRST) + rest)) as (url,):
        with fleet.replicas(("hi", url), ("lo", fake.url)):
            answer = await fleet.ask(STREAM)
    first, error = events_in(answer.content)
    assert first["model"] == "smol"
    assert (error["error"]["code"], error["error"]["type"], error["error"]["param"]) == (code, "upstream_error", None)
    assert len(fake.requests(CHAT)) == asked
    assert await fleet.total("quantgate_requests_total", alias="smol", variant="hi", code=code)


async def test_an_engine_that_dies_in_the_middle(fleet: Fleet) -> None:
    """vLLM's own error event is told without its words; streams and whole answers beside it fail over or say so."""
    async with running_fake("--fake-crash-after-requests", "0", "--fake-tokens-per-second", "50") as fake:
        with fleet.replicas(("hi", fake.url)):
            *_, error = events_in((await fleet.ask(STREAM)).content)
    assert error["error"]["message"] == "a replica failed with status 500"
    assert error["error"]["code"] == "upstream_error"


async def test_after_the_end_nothing_counts(fleet: Fleet) -> None:
    """A connection that breaks behind [DONE] broke after a whole answer."""
    before = await fleet.total("quantgate_requests_total", variant="mid", code="200")
    async with urls(answering(stream_head() + chunk(FIRST) + chunk(LAST) + chunk(DONE))) as (url,):
        with fleet.replicas(("mid", url)):
            answer = await fleet.ask(STREAM)
    assert answer.content == (FIRST + LAST).replace(b"m1", b"smol") + DONE
    assert await fleet.total("quantgate_requests_total", variant="mid", code="200") == before + 1


# Clients that leave


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_client_that_leaves_before_the_first_byte(fleet: Fleet, streaming: bool) -> None:
    """The replica is told at once, whether it was to stream or not, and nothing stays in flight."""
    before = await fleet.total("quantgate_requests_total", code="499", variant="hi")
    async with running_fake("--fake-stall-before-first-byte") as fake:
        with fleet.replicas(("hi", fake.url)):
            asking = asyncio.create_task(fleet.ask(STREAM if streaming else HELLO))
            await fake.requested(CHAT)
            asking.cancel()
            assert await fake.ended() == [{"event": "aborted", "tokens": 0}]
            await fleet.at_rest()
    assert await fleet.total("quantgate_requests_total", code="499", variant="hi") == before + 1


async def test_a_client_that_leaves_in_the_middle(fleet: Fleet) -> None:
    """A stream that nobody reads any more stops generating."""
    async with running_fake("--fake-stall-after-tokens", "2") as fake:
        with fleet.replicas(("hi", fake.url)):
            async with fleet.client.stream("POST", CHAT, json=STREAM) as answer:
                async for line in answer.aiter_lines():
                    if "heard" in line:
                        break
            assert await fake.ended() == [{"event": "aborted", "tokens": 2}]
            await fleet.at_rest()


async def test_a_client_that_hangs_up_behind_the_end(fleet: Fleet) -> None:
    """SDKs leave as soon as they have read [DONE]: that is an answer like any other, and no client that left."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head() + chunk(LAST + DONE))
        await peer.left()  # the end of the body never comes

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
    """Who waits for a replica and goes leaves no trace but a count."""
    before = await fleet.total("quantgate_requests_total", code="499", alias="smol", variant="none")
    with fleet.replicas(("hi", refusing()), state=State.STARTING):
        asking = asyncio.create_task(fleet.ask())
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not await fleet.total("quantgate_requests_in_flight"):
                pass
        asking.cancel()
        await fleet.at_rest()
    assert await fleet.total("quantgate_requests_total", code="499", alias="smol", variant="none") == before + 1


async def test_a_client_that_does_not_read(fleet: Fleet) -> None:
    """A slow client slows its replica down instead of filling the gateway's memory; when it goes, its stream ends."""
    said, gone = 0, asyncio.Event()
    piece = event('{"model":"m1","choices":["' + "x" * 2**16 + '"]}')

    async def behaviour(peer: Peer) -> None:
        nonlocal said
        await peer.request()
        await peer.say(stream_head())
        try:
            while said < 500 * 2**20:
                await peer.say(chunk(piece))
                said += len(piece)
        finally:
            gone.set()

    async with urls(behaviour) as (url,):
        with fleet.replicas(("hi", url)):
            async with connected(fleet.url) as peer:
                await peer.say(post(STREAM))
                await peer.read_until(b"\r\n\r\n")
                async with asyncio.timeout(DEADLINE_SECONDS):
                    before = -1
                    while before != said:
                        before = said
                        await asyncio.sleep(0.1)
                assert said < 100 * 2**20
            async with asyncio.timeout(DEADLINE_SECONDS):
                await gone.wait()
            await fleet.at_rest()


def post(body: dict[str, Any], path: str = CHAT) -> bytes:
    """A request as bytes."""
    content = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {JSON['content-type']}\r\n".encode() + (
        b"content-length: %d\r\n\r\n" % len(content) + content
    )


# Waiting


async def test_a_replica_that_is_starting_is_waited_for(fleet: Fleet, fake: FakeReplica) -> None:
    """Who asks too early is answered as soon as a replica is ready."""
    for state in (State.STARTING, State.WARMING):
        with fleet.replicas(("hi", fake.url), state=state):
            asking = asyncio.create_task(fleet.ask())
            async with asyncio.timeout(DEADLINE_SECONDS):
                while not await fleet.total("quantgate_requests_in_flight"):
                    pass
            fleet.registry.move("hi-0", State.READY)
            answer = await asking
        assert (answer.status_code, disclosed(answer)[-2:]) == (200, ("1", "preferred"))


async def test_waiting_has_an_end() -> None:
    """After `queue_seconds` the client is told to come back, and the wait is counted."""
    impatient = {**CONFIG["gateway"], "limits": {"queue_seconds": 0.05}}
    async with running_gateway(deployment({"gateway": impatient})) as fleet:
        with fleet.replicas(("hi", refusing()), state=State.STARTING):
            answer = await fleet.ask()
        assert await fleet.total("quantgate_queue_seconds_count", alias="smol") == 1
        assert await fleet.total("quantgate_requests_total", alias="smol", variant="none", code="503") == 1
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (503, "no_ready_replica")
    assert error["message"] == "no replica of 'smol' got ready in time"
    assert int(answer.headers["retry-after"]) > 0
    assert disclosed(answer) == (None,) * 5


@pytest.mark.parametrize("state", [State.FAILED, State.DRAINING, State.STOPPED, State.STOPPING])
async def test_nothing_to_wait_for(fleet: Fleet, state: State) -> None:
    """Without hope for a replica the refusal comes at once."""
    with fleet.replicas(("hi", refusing()), ("lo", refusing()), state=state):
        answer = await fleet.ask()
    assert (answer.status_code, error_of(answer)["message"]) == (503, "no replica of 'smol' is ready")
    assert "retry-after" in answer.headers


async def test_a_failure_is_not_waited_out(fleet: Fleet) -> None:
    """When all that could answer have failed, a replica that may start some time is no reason to keep the client."""
    with fleet.replicas(("hi", refusing())):
        fleet.registry.put(Replica("lo-9", "lo", "int4", refusing(), "m1"), State.STARTING)
        try:
            answer = await fleet.ask()
        finally:
            fleet.registry.remove("lo-9")
    assert (answer.status_code, error_of(answer)["code"]) == (502, "upstream_unreachable")


async def test_the_end_of_a_wait_may_be_a_floor(fleet: Fleet, fake: FakeReplica) -> None:
    """A replica that is ready but not permitted is no reason to stop waiting for one that is."""
    with fleet.replicas(("lo", fake.url)):
        fleet.registry.put(Replica("hi-9", "hi", "bf16", fake.url, "m1"), State.STARTING)
        asking = asyncio.create_task(fleet.ask(headers={"x-quantgate-precision": "bf16"}))
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while not await fleet.total("quantgate_requests_in_flight"):
                    pass
            fleet.registry.move("hi-9", State.READY)
            answer = await asking
        finally:
            fleet.registry.remove("hi-9")
    assert disclosed(answer) == ("hi", "bf16", "hi-9", "1", "preferred")


async def test_a_stopped_generation_is_seen_by_the_fake(fleet: Fleet) -> None:
    """A replica's metrics agree: what clients left was aborted there."""
    async with running_fake("--fake-stall-after-tokens", "1") as fake:
        with fleet.replicas(("hi", fake.url)):
            asking = [asyncio.create_task(fleet.ask(STREAM)) for _ in range(5)]
            await fake.requested(CHAT, 5)
            for each in asking:
                each.cancel()
            assert len(await eventually(lambda: ends if len(ends := fake.endings()) == 5 else None)) == 5
            await fleet.at_rest()


# What must not follow a request to the next one, or to another replica


async def test_a_stream_that_has_begun_is_not_begun_again(fleet: Fleet, fake: FakeReplica) -> None:
    """A replica that says in the middle that it has no room has broken off an answer, like any other error."""
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
                (told,) = events_in(b"".join([piece async for piece in pieces]))
    assert told["error"]["code"] == "overloaded"


async def test_an_error_stays_with_its_request(fleet: Fleet) -> None:
    """One that comes together with the end of its reply leaves a connection that the next request may use."""
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


async def test_what_is_not_tried_again_is_no_retry() -> None:
    """A lone replica that fails costs nothing of the budget, and counts as no further attempt."""
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


async def test_two_replicas_die_of_it_and_a_third_is_spared(fleet: Fleet, fake: FakeReplica) -> None:
    """A request that takes its replicas down is not sent to the next."""
    before = await fleet.total("quantgate_retries_refused_total", reason="poison")
    async with urls(answering(b""), answering(b"")) as (first, second):
        with fleet.replicas(("hi", first), ("mid", second), ("lo", fake.url)):
            asked = len(fake.requests(CHAT))
            answer = await fleet.ask()
    assert (answer.status_code, error_of(answer)["code"]) == (502, "upstream_disconnected")
    assert len(fake.requests(CHAT)) == asked
    assert await fleet.total("quantgate_retries_refused_total", reason="poison") == before + 1


async def test_an_unusual_status_comes_back(fleet: Fleet) -> None:
    """A 4xx that has no name in the books is the client's to read all the same."""
    async with urls(answering(whole(b'{"error":{"message":"odd"}}', "499 Odd"))) as (url,):
        with fleet.replicas(("hi", url)):
            answer = await fleet.ask()
    assert (answer.status_code, error_of(answer)["message"]) == (499, "odd")


async def test_what_a_key_has_left_is_told(fake: FakeReplica) -> None:
    """Of its limits a minute, at the time of the answer."""
    keys = keys_in_force({"k": StoredKey(sha256=(digest("qg-k"),), requests_per_minute=5)})
    async with running_gateway(deployment(keys=keys)) as fleet:
        with fleet.replicas(("hi", fake.url)):
            answers = [await fleet.ask(headers={"authorization": "Bearer qg-k"}) for _ in range(2)]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["4", "3"]


@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "stream"])
async def test_whoever_waits_when_the_gateway_stops(streaming: bool) -> None:
    """It is told to ask again, by a status, when the time for running requests is up."""
    async with (
        httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as client,
        running_gateway(deployment()) as fleet,
    ):
        with fleet.replicas(("hi", refusing()), state=State.STARTING):
            body = STREAM if streaming else HELLO
            asking = asyncio.create_task(client.post(f"{fleet.url}{CHAT}", json=body))
            while not await fleet.total("quantgate_waiting"):
                pass
            await fleet.served.front.drain(0.1)
            answer = await asking
    assert (answer.status_code, error_of(answer)["code"]) == (503, "draining")
    assert answer.headers["x-should-retry"] == "true"
