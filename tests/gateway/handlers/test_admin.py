"""The admin port."""

import asyncio
from hashlib import sha256
from typing import Any

import httpx
import pytest

from gateway.handlers.admin_auth import AdminAuth
from gateway.keys import StoredKey, keys_in_force
from gateway.process import gateway_alone
from serving.replica import Replica, State
from tests.fakes.running import DEADLINE_SECONDS, POLL_SECONDS, running_fake
from tests.gateway.fleet import HELLO, Fleet, clients, deployment, running_gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_alive(fleet: Fleet) -> None:
    """/livez answers 200 while the loop runs, whatever the replicas do."""
    answer = await fleet.admin.get("/livez")
    assert (answer.status_code, answer.json()) == (200, {"status": "alive"})


async def test_ready_if_any_alias_can_be_answered(fleet: Fleet) -> None:
    """/readyz answers 503 without a ready replica, 200 with one; ready variants are listed best rung first."""
    none_ready: dict[str, list[str]] = {"smol": [], "strict": [], "team/small": [], "hopeless": []}
    answer = await fleet.admin.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"aliases": none_ready})
    with fleet.replicas(("lo", "http://x"), state=State.STARTING):
        assert (await fleet.admin.get("/readyz")).status_code == 503
    with fleet.replicas(("lo", "http://x"), ("hi", "http://y")):
        answer = await fleet.admin.get("/readyz")
    ready = {"smol": ["hi", "lo"], "strict": ["hi"], "team/small": ["lo"], "hopeless": []}
    assert (answer.status_code, answer.json()) == (200, {"aliases": ready})


async def test_ready_without_aliases() -> None:
    """Without aliases the variants count."""
    async with running_gateway(deployment({"aliases": {}})) as fleet:
        with fleet.replicas(("hi", "http://x")):
            answer = await fleet.admin.get("/readyz")
    assert (answer.status_code, answer.json()["aliases"]["hi"]) == (200, ["hi"])


async def test_replicas(fleet: Fleet) -> None:
    """Every replica is listed with its state, reason, load and breaker, and without its credential."""
    replica = Replica("hi-0", "hi", "bf16", "http://x", "m1", api_key="secret")
    fleet.registry.put(replica, State.FAILED, "crashed")
    try:
        answer = await fleet.admin.get("/admin/replicas")
    finally:
        fleet.registry.remove("hi-0")
    expected = {"id": "hi-0", "variant": "hi", "precision": "bf16", "url": "http://x", "source": "direct"}
    assert answer.json() == [
        {**expected, "state": "failed", "reason": "crashed", "tools": None, "in_flight": 0, "breaker": "closed"}
    ]


async def test_the_queue(fleet: Fleet) -> None:
    """The number of waiting requests is listed by alias."""
    with fleet.replicas(("hi", "http://127.0.0.1:9"), state=State.STARTING):
        task = asyncio.create_task(fleet.ask())
        async with asyncio.timeout(DEADLINE_SECONDS):
            while (await fleet.admin.get("/admin/queue")).json() != {"smol": 1}:  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)
        assert await fleet.total("quantgate_waiting", alias="smol") == 1
        task.cancel()
        await fleet.at_rest()
    assert (await fleet.admin.get("/admin/queue")).json() == {}


PATHS = ("/metrics", "/admin/replicas", "/admin/queue", "/admin/openapi.json", "/nowhere")


@pytest.mark.parametrize("headers", [{"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}])
@pytest.mark.parametrize("path", PATHS)
async def test_requests_from_browsers_are_refused(fleet: Fleet, path: str, headers: dict[str, str]) -> None:
    """A web page must not read the admin port through the browser of an operator."""
    answer = await fleet.admin.get(path, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "browser_refused")
    assert (await fleet.admin.get(path, headers={"sec-fetch-site": "none"})).status_code in {200, 404}


async def test_the_admin_key() -> None:
    """With a key, only the probes answer without it; the keys of clients and of the admin port are separate."""
    settings = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "admin_key": "operators"}
    keys = keys_in_force({"alice": StoredKey(sha256=(sha256(b"clients").hexdigest(),))})
    async with running_gateway(deployment({"gateway": settings}, keys)) as fleet:
        for key, status in ((None, 401), ("clients", 401), ("operators", 200)):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            for path in ("/metrics", "/admin/replicas", "/admin/openapi.json"):
                assert (await fleet.admin.get(path, headers=headers)).status_code == status
            assert (await fleet.admin.get("/livez", headers=headers)).status_code == 200
            assert (await fleet.admin.get("/readyz", headers=headers)).status_code == 503
        assert (await fleet.client.get("/v1/models", headers={"x-api-key": "operators"})).status_code == 401


@pytest.mark.parametrize("headers", [[], [(b"authorization", b"Bearer ")], [(b"authorization", b"Basic ")]])
async def test_no_key_is_no_key(headers: list[tuple[bytes, bytes]]) -> None:
    """A request without a key is refused, even if the key in force were empty."""
    sent: list[dict[str, Any]] = []

    async def app(*_: object) -> None:
        raise AssertionError("the request was passed on")

    async def receive() -> dict[str, Any]:
        return {}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/metrics", "headers": headers}
    await AdminAuth(app, sha256(b"").digest())(scope, receive, send)
    assert sent[0]["status"] == 401


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/docs", "/openapi.json"])
async def test_no_client_paths(fleet: Fleet, path: str) -> None:
    """The two ports have no path in common."""
    assert (await fleet.admin.get(path)).status_code == 404


async def status_becomes(admin: Any, status: int) -> None:
    """Wait until /readyz answers with a status."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (await admin.get("/readyz")).status_code != status:  # noqa: ASYNC110 - waits for the gateway
            await asyncio.sleep(POLL_SECONDS)


async def test_a_gateway_in_front_of_external_replicas() -> None:
    """/readyz follows the replica: 503 until it is healthy, then 200, and 503 again when it is gone."""
    async with running_fake("--max-model-len", "4k", served="own alias", wait=False) as fake:
        replicas = [{"variant": "hi", "url": fake.url}]
        async with (
            gateway_alone(deployment({"replicas": replicas})) as addresses,
            clients(addresses) as (client, admin),
        ):
            # The request waits until the replica is ready.
            answer = await client.post("/v1/chat/completions", json=HELLO)
            assert (answer.status_code, answer.json()["model"]) == (200, "smol")
            assert answer.headers["x-quantgate-replica"] == "hi-url-1"
            await status_becomes(admin, 200)
            assert (await client.get("/v1/models/smol")).json()["max_model_len"] == 4000
            fake.process.kill()
            await status_becomes(admin, 503)
            (replica,) = (await admin.get("/admin/replicas")).json()
            assert (replica["state"], replica["reason"]) == ("failed", f"{fake.url} is not healthy")
            refused = await client.post("/v1/chat/completions", json=HELLO)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_ready_replica")


async def test_draining() -> None:
    """A gateway that stops finishes running requests, and refuses new ones."""
    async with running_fake("--fake-stall-after-tokens", "1") as stalling:
        stop = asyncio.Event()
        fleets: asyncio.Queue[Fleet] = asyncio.Queue()

        async def serve() -> None:
            async with running_gateway(deployment()) as fleet:
                fleet.registry.put(Replica("hi-0", "hi", "bf16", stalling.url, "m1"), State.READY)
                await fleets.put(fleet)
                await stop.wait()

        serving = asyncio.create_task(serve())
        fleet = await fleets.get()
        async with (
            httpx.AsyncClient(base_url=fleet.url, timeout=DEADLINE_SECONDS, trust_env=False) as client,
            clients(fleet.served.addresses) as (other, admin),
            client.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as answer,
        ):
            lines = answer.aiter_lines()
            await anext(lines)
            stop.set()
            await status_becomes(admin, 503)
            refused = await other.post("/v1/chat/completions", json=HELLO)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
            stalling.resume()
            assert [line async for line in lines if line][-1] == "data: [DONE]"
        await serving
