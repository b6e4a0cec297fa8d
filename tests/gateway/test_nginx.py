"""The gateway behind a real nginx, in the configurations that operators have."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from tests.fakes.running import DEADLINE_SECONDS, FakeReplica, running_fake
from tests.gateway.fleet import CHAT, HELLO, STREAM, Fleet, deployment, running_gateway
from tests.gateway.proxies import LOCATIONS, nginx, running_nginx

pytestmark = pytest.mark.asyncio(loop_scope="session")
LISTEN = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def behind_nginx() -> AsyncIterator[tuple[Fleet, dict[str, str]]]:
    """A gateway, and the urls of an nginx in front of it by location; skipped where nginx is not installed."""
    program = nginx()
    if program is None:
        pytest.skip("no nginx; `apt-get install nginx-light` brings one")
    # One location passes the upstream's name on as the host.
    async with (
        running_gateway(deployment({"gateway": {**LISTEN, "allowed_hosts": ["gateway"]}})) as fleet,
        running_nginx(program, fleet.served.addresses.client) as urls,
    ):
        yield fleet, urls


@pytest.mark.parametrize("location", LOCATIONS)
async def test_a_stream_is_not_held_back(behind_nginx: tuple[Fleet, dict[str, str]], location: str) -> None:
    """Its first token arrives while the replica is still generating, although nginx buffers by default."""
    fleet, urls = behind_nginx
    async with running_fake("--fake-stall-after-tokens", "2") as fake, client_of(urls[location]) as client:
        with fleet.replicas(("hi", fake.url)):
            async with client.stream("POST", CHAT, json=STREAM) as answer:
                lines = answer.aiter_lines()
                async with asyncio.timeout(DEADLINE_SECONDS):
                    while "heard" not in await anext(lines):
                        pass
                fake.resume()
                rest = [line async for line in lines if line]
    assert (answer.status_code, rest[-1]) == (200, "data: [DONE]")
    await fleet.at_rest()


@pytest.mark.parametrize("location", LOCATIONS)
async def test_answers_and_errors(behind_nginx: tuple[Fleet, dict[str, str]], location: str, fake: FakeReplica) -> None:
    """A whole answer, a list, a head and an error come through, one after the other."""
    fleet, urls = behind_nginx
    async with client_of(urls[location]) as client:
        with fleet.replicas(("hi", fake.url)):
            for _ in range(2):
                whole = await client.post(CHAT, json=HELLO)
                assert (whole.status_code, whole.json()["model"]) == (200, "smol")
                assert (await client.get("/v1/models")).json()["object"] == "list"
                assert (await client.head("/v1/models")).status_code == 200
                assert (await client.post(CHAT, json={"model": "nobody"})).status_code == 404
    await fleet.at_rest()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("location", LOCATIONS)
async def test_a_client_that_leaves(behind_nginx: tuple[Fleet, dict[str, str]], location: str, streaming: bool) -> None:
    """nginx closes its connection to the gateway then, and the generation is aborted."""
    fleet, urls = behind_nginx
    async with running_fake("--fake-stall-before-first-byte") as fake, client_of(urls[location]) as client:
        with fleet.replicas(("hi", fake.url)):
            task = asyncio.create_task(client.post(CHAT, json=STREAM if streaming else HELLO))
            await fake.requested(CHAT)
            task.cancel()
            assert await fake.ended() == [{"event": "aborted", "tokens": 0}]
            await fleet.at_rest()


def client_of(url: str) -> httpx.AsyncClient:
    """A client of one location."""
    return httpx.AsyncClient(base_url=url, timeout=DEADLINE_SECONDS, trust_env=False)
