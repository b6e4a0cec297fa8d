"""What the status page asks of the admin port, without a browser."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from gateway.handlers.status import MAX_STREAMS, StatusStreams
from gateway.http.interfaces import ClientTimeouts
from gateway.http.listener import listen
from gateway.http.sockets import address_of, bind
from gateway.keys import StoredKey, keys_in_force
from gateway.routing.explain import explain_recorded
from gateway.routing.snapshot import read_snapshot
from gateway.status.source import StatusSource
from gateway.status.values import read_status
from tests.fakes.running import FakeReplica, eventually, running_fake
from tests.gateway.fleet import CHAT, HELLO, STREAM, Fleet, deployment, events_in, running_gateway, text_of
from tests.gateway.wire import connected

pytestmark = pytest.mark.asyncio(loop_scope="session")

PAGE_FILES = sorted(entry.name for entry in (resources.files("gateway") / "ui").iterdir() if entry.is_file())
LISTEN: dict[str, Any] = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0"}


@pytest.mark.parametrize("path", ["", *PAGE_FILES, "vendor/uplot-1.6.32/uPlot.iife.min.js"])
async def test_files_of_the_page(fleet: Fleet, path: str) -> None:
    """Each has its type, and a policy that permits nothing from elsewhere and nothing inline."""
    answer = await fleet.admin.get(f"/ui/{path}", headers={"sec-fetch-site": "cross-site"})
    assert answer.status_code == 200
    kind = path.rpartition(".")[2] or "html"
    assert answer.headers["content-type"].startswith(
        {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}[kind]
    )
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path", ["nothing.js", "screenshots/desktop-dark.png", "vendor/uplot-1.6.32/LICENSE", "%2e%2e/app.py"]
)
async def test_no_other_files(fleet: Fleet, path: str) -> None:
    """Only what a browser loads is served."""
    assert (await fleet.admin.get(f"/ui/{path}")).status_code == 404


async def test_the_short_address(fleet: Fleet) -> None:
    """/ui leads to the page."""
    answer = await fleet.admin.get("/ui")
    assert (answer.status_code, answer.headers["location"]) == (307, "ui/")
    assert (await fleet.admin.get("/ui", follow_redirects=True)).headers["content-type"].startswith("text/html")


async def test_nothing_is_loaded_from_elsewhere() -> None:
    """No file of ours names an address or builds markup from text."""
    for name in PAGE_FILES:
        text = (resources.files("gateway") / "ui" / name).read_text()
        assert "https://" not in text
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
        for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "style="):
            assert sink not in text, name


# Who may ask


async def test_only_its_own_page_may_ask(fleet: Fleet) -> None:
    """A browser sends the origin of the page with a POST: it must be that of the port itself."""
    own = f"http://{fleet.served.addresses.admin}"
    body = {"alias": "smol"}
    for headers, status in (
        ({"origin": own, "sec-fetch-site": "same-origin"}, 404),
        ({"origin": own}, 404),
        ({}, 404),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": own, "sec-fetch-site": "cross-site"}, 403),
        ({"origin": f"{own}.evil.example"}, 403),
        ({"origin": f"http://{fleet.served.addresses.client}"}, 403),
    ):
        answer = await fleet.admin.post("/admin/rollouts/pause", json=body, headers=headers)
        assert answer.status_code == status, headers
    # A page whose name was rebound to loopback has that name in both headers.
    rebound = {"origin": "http://evil.example", "host": "evil.example"}
    answer = await fleet.admin.post("/admin/rollouts/pause", json=body, headers=rebound)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")


async def test_a_form_cannot_steer(fleet: Fleet) -> None:
    """What a form can send without asking first is no command."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {"content-type": kind}
        for path in ("/admin/rollouts/abort", "/admin/trial"):
            answer = await fleet.admin.post(path, content=b'{"alias": "smol"}', headers=headers)
            assert answer.status_code in {415, 422}


async def test_everything_but_the_files_needs_the_key() -> None:
    """With gateway.admin_key, the page can be loaded, and nothing else."""
    async with running_gateway(deployment({"gateway": {**LISTEN, "admin_key": "operators"}})) as fleet:
        assert (await fleet.admin.get("/ui/")).status_code == 200
        for method, path in (
            *(("GET", "/admin/status"), ("GET", "/admin/status/stream"), ("GET", "/admin/routing/r/explanation")),
            *(("POST", "/admin/trial"), ("POST", "/admin/rollouts/pause")),
        ):
            assert (await fleet.admin.request(method, path, json={})).status_code == 401
        # A key in a header cannot be sent by another site: with it, the page's own POST is answered.
        headers = {"authorization": "Bearer operators", "origin": f"http://{fleet.served.addresses.admin}"}
        answer = await fleet.admin.post("/admin/rollouts/pause", json={"alias": "smol"}, headers=headers)
        assert (answer.status_code, answer.json()["detail"]) == (
            *(404, "gateway.state is not set; rollouts are recorded there"),
        )


# The stream


async def _events(answer: httpx.Response) -> AsyncIterator[tuple[str, str]]:
    kind = "message"
    async for line in answer.aiter_lines():
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, line.removeprefix("data: ")
            kind = "message"


async def test_the_stream_ends_when_the_gateway_drains() -> None:
    """A status each second; then `end`, so that the gateway stops at once."""
    async with running_gateway(deployment()) as fleet:
        async with fleet.admin.stream("GET", "/admin/status/stream") as answer:
            assert answer.headers["content-type"] == "text/event-stream"
            events = _events(answer)
            first, second = [read_status((await anext(events))[1].encode()) for _ in range(2)]
            assert 0.5 < second.gateway.now_at - first.gateway.now_at < 5
            fleet.served.server.handler.draining = True  # type: ignore[attr-defined]
            assert [event async for event in events] == [("end", "draining")]
        assert (await fleet.admin.get("/admin/status/stream")).status_code == 503


async def test_an_open_stream_does_not_delay_the_end() -> None:
    """A gateway that stops ends the streams itself."""
    async with running_gateway(deployment()) as fleet:
        client = httpx.AsyncClient(base_url=f"http://{fleet.served.addresses.admin}", trust_env=False)
        request = client.build_request("GET", "/admin/status/stream")
        answer = await client.send(request, stream=True)
        began = time.monotonic()
    assert time.monotonic() - began < 20
    assert (await answer.aread()).endswith(b"event: end\ndata: draining\n\n")
    await client.aclose()


async def test_streams_are_few(fleet: Fleet) -> None:
    """More than MAX_STREAMS are refused; one that its reader left frees its place."""
    address = f"http://{fleet.served.addresses.admin}"
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, trust_env=False, limits=limits, timeout=10) as client:
        asked = client.build_request("GET", "/admin/status/stream")
        streams = [await client.send(asked, stream=True) for _ in range(MAX_STREAMS)]
        readers = [aiter(stream.aiter_raw()) for stream in streams]
        await asyncio.gather(*(anext(reader) for reader in readers))
        refused = await fleet.admin.get("/admin/status/stream")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        await asyncio.gather(*(stream.aclose() for stream in streams))
    async with asyncio.timeout(10):
        while True:
            async with fleet.admin.stream("GET", "/admin/status/stream") as answer:
                if answer.status_code == 200:
                    break


async def test_head_of_the_stream(fleet: Fleet) -> None:
    """It has headers and an end, and takes no place."""
    async with asyncio.timeout(10):
        for _ in range(MAX_STREAMS + 1):
            answer = await fleet.admin.head("/admin/status/stream")
            assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream")
        assert (await fleet.admin.head("/admin/status")).headers["content-type"] == "application/json"
        async with fleet.admin.stream("GET", "/admin/status/stream") as stream:
            assert stream.status_code == 200


@dataclass
class LongStatus:
    """A status that fills every buffer on the way to a reader."""

    text: bytes = b"x" * 2**24

    def draining(self) -> bool:
        """Go on."""
        return False

    def shared_json(self) -> bytes:
        """The status."""
        return self.text


async def test_a_reader_that_does_not_read() -> None:
    """Its place is free again after slow_reader_seconds."""

    async def refresh() -> None:
        """Nothing to read."""

    app, streams = FastAPI(), StatusStreams(cast("StatusSource", LongStatus()), refresh)

    @app.get("/")
    async def stream() -> StreamingResponse:
        return StreamingResponse(streams.events())

    with bind("127.0.0.1:0", "test") as taken:
        async with listen(app, taken, ClientTimeouts(slow_reader_seconds=0.2)), connected(address_of(taken)) as peer:
            await peer.say(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await peer.read_until(b"data: ")
            assert streams.open == 1
            await eventually(lambda: not streams.open, 5)


# Trials and explanations


async def test_a_trial_is_a_request_like_any_other(fleet: Fleet, fake: FakeReplica) -> None:
    """It is streamed with the headers of every client, counted, and its decision is explained."""
    with fleet.replicas(("hi", fake.url), ("lo", fake.url)):
        answer = await fleet.admin.post("/admin/trial", json=STREAM, headers={"x-quantgate-precision": "int4"})
        assert (answer.status_code, answer.headers["x-quantgate-replica"]) == (200, "lo-1")
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = events_in(answer.content)
        assert events[-1] == "[DONE]"
        assert text_of(events)
        whole = await fleet.admin.post("/admin/trial", json=HELLO)
        assert whole.json()["choices"][0]["message"]["content"]
        assert fake.requests(CHAT)[-1]["headers"].keys().isdisjoint({"x-quantgate-key", "authorization", "origin"})
        request_id = answer.headers["x-request-id"]
        explained = await fleet.admin.get(f"/admin/routing/{request_id}/explanation")
        recorded = await fleet.admin.get(f"/admin/routing/{request_id}")
        assert (await fleet.admin.get("/admin/routing/req-unknown/explanation")).status_code == 404
        await fleet.at_rest()
    explanation = explained.json()["explanation"]
    assert explanation["chosen"] == {"replica": "lo-1", "variant": "lo", "precision": "int4", "reason": "floor"}
    again = explain_recorded(read_snapshot(recorded.content, "a test"))
    assert [each["why_not"] for each in explanation["candidates"]] == [each.why_not for each in again.candidates]


@pytest.mark.parametrize(
    "content, status, code",
    [(b"{", 400, "invalid_json"), (b'{"model": "nope", "messages": []}', 404, "model_not_found"), (b"", 400, None)],
)
async def test_a_trial_that_is_refused(fleet: Fleet, content: bytes, status: int, code: str | None) -> None:
    """The page is told what a client would be told."""
    answer = await fleet.admin.post("/admin/trial", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert code is None or answer.json()["error"]["code"] == code


async def test_a_trial_that_is_too_long(fleet: Fleet) -> None:
    """It is a small box."""
    body = {**HELLO, "messages": [{"role": "user", "content": "x" * 70_000}]}
    assert (await fleet.admin.post("/admin/trial", json=body)).status_code == 413


async def test_a_trial_needs_a_clients_key(fake: FakeReplica) -> None:
    """The admin key opens no model, and the limits of the client's key count."""
    stored = StoredKey(sha256=(sha256(b"qg-alice").hexdigest(),), concurrency=1)
    async with running_gateway(deployment(keys=keys_in_force({"alice": stored}))) as fleet:
        with fleet.replicas(("hi", fake.url)):
            for key, status in ((None, 401), ("nope", 401), ("qg-alice", 200), ("qg-alice", 200)):
                headers = {"x-quantgate-key": key} if key else {}
                assert (await fleet.admin.post("/admin/trial", json=HELLO, headers=headers)).status_code == status


async def test_a_trial_whose_reader_leaves() -> None:
    """Its generation is aborted, as that of a client that leaves."""
    async with running_fake("--fake-stall-after-tokens", "2") as stalling, running_gateway(deployment()) as fleet:
        with fleet.replicas(("hi", stalling.url)):
            async with fleet.admin.stream("POST", "/admin/trial", json=STREAM) as answer:
                await anext(aiter(answer.aiter_raw()))
            await fleet.at_rest()
            assert (await stalling.ended())[0]["event"] == "aborted"
