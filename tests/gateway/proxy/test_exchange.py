"""One request between a client and its replicas: what is passed on, what is retried, and which errors clients get."""

import asyncio
import json
import re
from typing import Any

import httpx
import pytest

from serving.replica import Replica, State
from tests.fakes.running import DEADLINE_SECONDS, FakeReplica, running_fake
from tests.gateway.fleet import (
    CHAT,
    HELLO,
    STREAM,
    TEXT,
    Fleet,
    error_of,
    events_in,
    text_of,
)
from tests.gateway.proxy.exchanging import (
    ANSWER,
    DONE,
    FIRST,
    LAST,
    event,
    routing_headers,
    urls,
)
from tests.gateway.wire import Peer, answering, stream, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROMPT: dict[str, Any] = {"model": "smol", "prompt": "hello there", "max_tokens": 5}
USAGE = {"stream_options": {"include_usage": True}}


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
