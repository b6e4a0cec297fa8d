"""Requests that fail on every replica in the same way: what their client learns, and what everybody else notices."""

import json
from typing import Any

import pytest

from tests.gateway.fleet import HELLO, STREAM, Fleet, deployment, error_of, running_gateway
from tests.gateway.proxy.recorded import WHOLE, events, recorded
from tests.gateway.wire import Behaviour, Peer, scripted, stream, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

WORDS = "Cannot connect to host nosuch.invalid:443 ssl:default [Name or service not known]"
BAD_USER = "bad"


def engine(status: str, words: str = WORDS, *, in_stream: bool = False) -> Behaviour:
    """Fail the requests of one user with this status, and answer all others."""
    error = {"message": words, "type": "InternalServerError", "param": None, "code": int(status[:3])}
    refusal = json.dumps({"error": error}).encode()

    async def behaviour(peer: Peer) -> None:
        while True:
            body = json.loads((await peer.request()).partition(b"\r\n\r\n")[2])
            if body.get("user") != BAD_USER:
                await peer.say(stream(*events(recorded("text"))) if body.get("stream") else whole(WHOLE))
            elif in_stream:
                await peer.say(stream(b"data: " + refusal + b"\n\n", b"data: [DONE]\n\n"))
            else:
                await peer.say(whole(refusal, status))

    return behaviour


async def tripped(fleet: Fleet, **labels: str) -> float:
    """How many breakers are open or half-open."""
    states = ("open", "half_open")
    return sum([await fleet.total("quantgate_replica_breaker", state=state, **labels) for state in states])


@pytest.mark.parametrize(
    "streaming, in_stream", [(False, False), (True, False), (True, True)], ids=["unary", "stream", "event"]
)
async def test_one_bad_request_shuts_out_no_replica(streaming: bool, in_stream: bool) -> None:
    """Its client gets the engine's words; breakers stay closed, and others are answered by the best rung."""
    bad = {**(STREAM if streaming else HELLO), "user": BAD_USER}
    behaviour = engine("500 Internal Server Error", in_stream=in_stream)
    async with (
        running_gateway(deployment()) as fleet,
        scripted(behaviour) as first,
        scripted(behaviour) as second,
        scripted(behaviour) as low,
    ):
        with fleet.replicas(("hi", first.url), ("hi", second.url), ("lo", low.url)):
            for _ in range(6):
                answer = await fleet.ask(bad)
                assert answer.status_code == 502
                assert WORDS in error_of(answer)["message"]
                assert answer.headers["x-should-retry"] == "false"
                others = [(await fleet.ask()).headers["x-quantgate-variant"] for _ in range(2)]
                assert others == ["hi", "hi"]
            assert await tripped(fleet) == 0


async def test_many_bad_requests_use_up_no_budget() -> None:
    """Every one of them is seen to fail on two replicas, however small the retry budget is."""
    settings = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "retries": {"share": 0, "burst": 2}}
    behaviour = engine("500 No")
    async with (
        running_gateway(deployment({"gateway": settings})) as fleet,
        scripted(behaviour) as first,
        scripted(behaviour) as second,
    ):
        with fleet.replicas(("hi", first.url), ("hi", second.url)):
            for _ in range(8):
                assert WORDS in (await fleet.ask({**HELLO, "user": BAD_USER})).text
            assert await tripped(fleet) == 0


async def test_a_replica_that_fails_alone_is_shut_out() -> None:
    """A request that another replica answers was not at fault."""
    bad = {**HELLO, "user": BAD_USER}
    healthy = engine("500 No")

    async def answers_all(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.say(whole(WHOLE))

    async with running_gateway(deployment()) as fleet, scripted(healthy) as failing, scripted(answers_all) as good:
        with fleet.replicas(("hi", failing.url), ("hi", good.url)):
            answers = [await fleet.ask(bad) for _ in range(8)]
            assert [answer.status_code for answer in answers] == [200] * 8
            assert await tripped(fleet, replica="hi-0") == 1


@pytest.mark.parametrize("words", ["EngineCore encountered an issue. See stack trace (above) for the root cause.", ""])
async def test_engines_that_died_say_nothing(words: str) -> None:
    """What an engine says of itself is not about the request: it is held against its replica, and not shown."""
    behaviour = engine("500 No", words)
    async with running_gateway(deployment()) as fleet, scripted(behaviour) as first, scripted(behaviour) as second:
        with fleet.replicas(("hi", first.url), ("mid", second.url)):
            for _ in range(3):
                error = error_of(await fleet.ask({**HELLO, "user": BAD_USER}))
                assert error["message"] == "a replica failed with status 500"
            assert await tripped(fleet) == 2


async def test_different_failures_are_held_against_replicas() -> None:
    """A 500 here and a 501 there do not follow the request."""
    async with (
        running_gateway(deployment()) as fleet,
        scripted(engine("500 No")) as first,
        scripted(engine("501 No")) as second,
    ):
        with fleet.replicas(("hi", first.url), ("mid", second.url)):
            for _ in range(3):
                assert WORDS not in (await fleet.ask({**HELLO, "user": BAD_USER})).text
            assert await tripped(fleet) == 2


async def test_half_of_a_variant_answers_whatever_is_below() -> None:
    """With both of its breakers open, a variant is asked all the same: the rung below gets what fails there."""
    retries = {"share": 0, "burst": 4}
    settings = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "retries": retries}
    async with (
        running_gateway(deployment({"gateway": settings})) as fleet,
        scripted(engine("500 No")) as first,
        scripted(engine("501 No")) as second,
        scripted(engine("500 No")) as low,
    ):
        with fleet.replicas(("hi", first.url), ("hi", second.url)):
            for _ in range(4):
                await fleet.ask({**HELLO, "user": BAD_USER})
            assert await tripped(fleet) == 2
            with fleet.replicas(("lo", low.url)):
                answer = await fleet.ask()
                assert answer.headers["x-quantgate-variant"] == "hi"
                assert await tripped(fleet) == 1, "an answer closes it"


async def test_retries_of_a_replica_that_is_known_to_fail_are_free() -> None:
    """Asking it costs no more of the budget than leaving it out: every request is answered by the rung below."""

    async def fails(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.say(whole(b"", "500 No"))

    settings: dict[str, Any] = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "retries": {"share": 0, "burst": 3}}
    async with (
        running_gateway(deployment({"gateway": settings})) as fleet,
        scripted(fails) as only,
        scripted(engine("500 No")) as low,
    ):
        with fleet.replicas(("hi", only.url), ("lo", low.url)):
            answers = [await fleet.ask() for _ in range(12)]
    assert [answer.status_code for answer in answers] == [200] * 12
    assert {answer.headers["x-quantgate-variant"] for answer in answers} == {"lo"}


@pytest.mark.parametrize("encoding", ["bytes", "bytes_only", "utf-8"])
async def test_an_encoding_that_is_not_relayed(encoding: str) -> None:
    """It is refused before any replica is asked: no replica is to blame for bytes."""
    body = {"model": "smol", "input": "x", "encoding_format": encoding}
    async with running_gateway(deployment()) as fleet, scripted(engine("500 No")) as replica:
        with fleet.replicas(("hi", replica.url)):
            answer = await fleet.ask(body, path="/v1/embeddings")
        assert replica.peers == []
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (400, "encoding_format", "unsupported")
    assert "base64" in error["message"]
