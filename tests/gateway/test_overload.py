"""Ten times the load that the replicas take: every request ends with an answer, or with 429 and a retry-after."""

import asyncio
from collections import Counter

import httpx
import pytest

from serving.replica import Replica, State
from tests.fakes.running import DEADLINE_SECONDS, eventually, running_fake
from tests.gateway.fleet import CHAT, HELLO, STREAM, Fleet, deployment, running_gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")

# Two replicas run two requests each, and queue as many more themselves.
SMALL = ("--max-num-seqs", "2", "--fake-queue-limit", "4", "--fake-tokens", "8", "--fake-tokens-per-second", "100")
CAPACITY = 8
LOAD = 10 * CAPACITY
QUEUE = 12
ROUNDS = 3
GAUGES = ("quantgate_requests_in_flight", "quantgate_replica_in_flight", "quantgate_waiting")
GATEWAY = {
    "listen": "127.0.0.1:0",
    "admin": "127.0.0.1:0",
    "queue": {"per_alias": QUEUE, "in_all": QUEUE},
    "limits": {"queue_seconds": DEADLINE_SECONDS},
}


async def client(http: httpx.AsyncClient, number: int) -> list[httpx.Response]:
    """Send the next request as soon as the last is answered."""
    body = STREAM if number % 2 else HELLO
    return [await http.post(CHAT, json=body) for _ in range(ROUNDS)]


async def most_waiting(fleet: Fleet, storm: "asyncio.Future[list[list[httpx.Response]]]") -> float:
    """The most requests that were queued at once while the storm lasts."""
    most = 0.0
    while not storm.done():
        most = max(most, await fleet.total("quantgate_waiting"))
    return most


@pytest.mark.parametrize("known", [True, False], ids=["limit known", "limit unknown"])
async def test_ten_times_the_load(known: bool) -> None:
    """Every response is 200, or 429 with a retry-after; the queue stays within its limit; in the end nothing is held.

    The gateway knows how many requests a replica takes, or learns it from refusals.
    """
    async with (
        running_fake(*SMALL) as first,
        running_fake(*SMALL) as second,
        running_gateway(deployment({"gateway": GATEWAY})) as fleet,
        httpx.AsyncClient(
            base_url=fleet.url,
            timeout=DEADLINE_SECONDS * 2,
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
        ) as http,
    ):
        for fake in (first, second):
            limit = CAPACITY // 2 if known else 512
            replica = Replica(f"r{fake.port}", "hi", "bf16", fake.url, "m1", max_in_flight=limit)
            fleet.registry.put(replica, State.READY)
        storm = asyncio.gather(*(client(http, number) for number in range(LOAD)))
        most = await most_waiting(fleet, storm)
        answers = [answer for own in await storm for answer in own]
        statuses = Counter(answer.status_code for answer in answers)
        assert set(statuses) == {200, 429}
        assert statuses[200] >= CAPACITY + QUEUE
        assert statuses.total() == LOAD * ROUNDS
        for answer in answers:
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 120
                assert answer.headers["x-should-retry"] == "true"
            elif answer.headers["content-type"].startswith("text/event-stream"):
                assert answer.content.endswith(b"data: [DONE]\n\n")
                assert b'"error"' not in answer.content
        assert most <= QUEUE
        await fleet.at_rest()
        await eventually(lambda: fleet.reserved_bytes() == 0 or None)
        assert [await fleet.total(gauge) for gauge in GAUGES] == [0, 0, 0]


async def test_an_unknown_limit_refuses_no_request() -> None:
    """Every request that may wait is answered in the end, and the replica is not asked over and over."""
    async with (
        running_fake(*SMALL) as fake,
        running_gateway(deployment()) as fleet,
        httpx.AsyncClient(
            base_url=fleet.url,
            timeout=DEADLINE_SECONDS * 2,
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
        ) as http,
    ):
        with fleet.replicas(("hi", fake.url)):
            answers = await asyncio.gather(*(http.post(CHAT, json=HELLO) for _ in range(5 * CAPACITY)))
        assert {answer.status_code for answer in answers} == {200}
        # The first wave, and the requests by which the limit is learned.
        assert len(fake.requests(CHAT)) < 4 * len(answers)
