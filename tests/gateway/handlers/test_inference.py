"""Inference endpoints: limits, request ids, connections, and clients that leave."""

import asyncio
import json
import random
from typing import Any

import pytest

from tests.fakes.running import FakeReplica, eventually, running_fake
from tests.gateway.fleet import CHAT, HELLO, JSON, STREAM, TEXT, Fleet, error_of
from tests.gateway.wire import connected

pytestmark = pytest.mark.asyncio(loop_scope="session")

BODY_LIMIT_BYTES = 64 * 1024


@pytest.mark.parametrize(
    "body, headers, status, code, param",
    [
        (b"", {}, 400, "invalid_json", None),
        (b"{", {}, 400, "invalid_json", None),
        (b"[]", {}, 400, "invalid_json", None),
        (b'{"model\xff":1}', {}, 400, "invalid_json", None),
        (b'{"x":' + b"[" * 30_000 + b"]" * 30_000 + b"}", {}, 400, "invalid_json", None),
        (b"{}", {}, 400, "invalid_request", "model"),
        (b'{"model":"smol","n":5}', {}, 400, "invalid_request", "n"),
        (b'{"model":"smol","stream":"maybe"}', {}, 400, "invalid_request", "stream"),
        (b'{"model":"gpt-4o"}', {}, 404, "model_not_found", "model"),
        (b'{"model":"smol"}', {"content-type": "text/plain"}, 400, "invalid_request", None),
        (b'{"model":"smol"}', {"content-type": ""}, 400, "invalid_request", None),
        (b'{"model":"smol"}', {"x-quantgate-floor": "speed=9"}, 400, "invalid_request", "x-quantgate-floor"),
        (b" " * (BODY_LIMIT_BYTES + 1), {}, 413, "request_too_large", None),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_refusals(
    fleet: Fleet, path: str, body: bytes, headers: dict[str, str], status: int, code: str, param: str | None
) -> None:
    """The gateway's own refusals have OpenAI's shape and a code that is a string, and are counted without a model."""
    endpoint = "chat.completions" if path == CHAT else "completions"
    counted = {"alias": "_unknown", "variant": "none", "code": str(status), "endpoint": endpoint}
    before = await fleet.total("quantgate_requests_total", **counted)
    answer = await fleet.ask(body, headers, path)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert "x-quantgate-variant" not in answer.headers
    assert await fleet.total("quantgate_requests_total", **counted) == before + 1


async def test_a_body_of_the_maximum_size(fleet: Fleet, fake: FakeReplica) -> None:
    """It is accepted."""
    text = json.dumps(HELLO).encode()
    with fleet.replicas(("hi", fake.url)):
        assert (await fleet.ask(text + b" " * (BODY_LIMIT_BYTES - len(text)))).status_code == 200


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON"])
async def test_kinds_of_json(fleet: Fleet, fake: FakeReplica, kind: str) -> None:
    """The content type may have parameters, and is not case-sensitive."""
    with fleet.replicas(("hi", fake.url)):
        assert (await fleet.ask(headers={"content-type": kind})).status_code == 200


@pytest.mark.parametrize(
    "values",
    [
        {"n": 1.0},
        {"stream": True, "stream_options": {"include_usage": "true"}},
        {"top_logprobs": 5.0, "logprobs": True},
        {"max_tokens": "3"},
    ],
)
async def test_values_that_vllm_converts(fleet: Fleet, fake: FakeReplica, values: dict[str, Any]) -> None:
    """They are accepted, and reach the replica as the client sent them."""
    with fleet.replicas(("hi", fake.url)):
        answer = await fleet.ask({**HELLO, **values})
        assert answer.status_code == 200, answer.text
        assert values.items() <= fake.requests(CHAT)[-1]["body"].items()


async def test_an_upload_in_chunks(fleet: Fleet, fake: FakeReplica) -> None:
    """A body without a length is accepted if it is short, and refused as soon as it is too long."""
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {JSON['content-type']}\r\n".encode()
    text = json.dumps(HELLO).encode()
    with fleet.replicas(("hi", fake.url)):
        async with connected(fleet.url) as peer:
            await peer.say(head + b"transfer-encoding: chunked\r\n\r\n")
            for part in (text[:9], text[9:], b""):
                await peer.say(b"%x\r\n%b\r\n" % (len(part), part))
            assert (await peer.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        async with connected(fleet.url) as peer:
            await peer.say(head + b"transfer-encoding: chunked\r\n\r\n")
            for _ in range(BODY_LIMIT_BYTES // 1000 + 1):
                await peer.say(b"3e8\r\n" + b" " * 1000 + b"\r\n")
            assert (await peer.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")


async def test_a_client_that_leaves_during_the_upload(fleet: Fleet, fake: FakeReplica) -> None:
    """No replica gets a part of a request, and its memory is released."""
    before = len(fake.requests(CHAT))
    with fleet.replicas(("hi", fake.url)):
        async with connected(fleet.url) as peer:
            await peer.say(f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n".encode())
            await peer.say(b"content-length: 100\r\n\r\n{")
            await eventually(lambda: fleet.reserved_bytes() or None)
        await eventually(lambda: None if fleet.reserved_bytes() else True)
    assert len(fake.requests(CHAT)) == before


@pytest.mark.parametrize("given", ["r-1", "a.b:c_d-E", "x" * 128])
async def test_a_valid_request_id_is_kept(fleet: Fleet, fake: FakeReplica, given: str) -> None:
    """The client's id is in every response, and is sent to the replica."""
    with fleet.replicas(("hi", fake.url)):
        for body in (HELLO, STREAM, b"{"):
            assert (await fleet.ask(body, {"x-request-id": given})).headers["x-request-id"] == given
    assert fake.requests(CHAT)[-1]["headers"]["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "<script>", 'a"b', "a/b"])
async def test_an_invalid_request_id_is_replaced(fleet: Fleet, fake: FakeReplica, given: str) -> None:
    """An id that could be harmful in a log is not used."""
    with fleet.replicas(("hi", fake.url)):
        answers = [await fleet.ask(headers={"x-request-id": given}) for _ in range(2)]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 2
    assert all(each.startswith("req-") for each in ids)


async def test_a_connection_serves_several_requests(fleet: Fleet, fake: FakeReplica) -> None:
    """After a unary answer, an error or a stream, the client may send the next request."""
    content = {shape: json.dumps(body).encode() for shape, body in (("whole", HELLO), ("stream", STREAM))}
    content["invalid"] = b"{"
    with fleet.replicas(("hi", fake.url)):
        async with connected(fleet.url) as peer:
            for shape in ("whole", "stream", "invalid", "whole", "stream"):
                body = content[shape]
                head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                await peer.say(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
                status = b"400" if shape == "invalid" else b"200"
                assert (await peer.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 " + status)
                await peer.read_until(b"0\r\n\r\n" if shape == "stream" else b"}" * (2 if shape == "invalid" else 1))
                if shape == "whole":
                    await peer.read_until(b'"kv_transfer_params":null}')


async def test_many_clients_that_leave(fleet: Fleet) -> None:
    """Of a thousand clients that leave at any moment, none leaves a request in flight, here or at the replica."""
    rng = random.Random(7)
    body = json.dumps({**STREAM, "max_tokens": 8}).encode()
    request = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n".encode() + (
        b"content-length: %d\r\n\r\n" % len(body) + body
    )

    async def connect_and_leave() -> None:
        async with connected(fleet.url) as peer:
            if rng.random() < 0.3:
                await peer.say(request[: rng.randrange(len(request))])
                return
            await peer.say(request)
            for _ in range(rng.randrange(4)):
                if (await peer.read_some()).endswith(b"0\r\n\r\n"):
                    return  # the answer was complete before the client left

    async with running_fake("--fake-tokens-per-second", "200") as fake:
        with fleet.replicas(("hi", fake.url), ("lo", fake.url)):
            for _ in range(20):
                await asyncio.gather(*(connect_and_leave() for _ in range(50)))
            await fleet.at_rest()
            started = len(fake.requests(CHAT))
            assert started > 100
            await eventually(lambda: len(fake.endings()) == len(fake.requests(CHAT)) or None)
            assert (await fleet.ask()).status_code == 200
