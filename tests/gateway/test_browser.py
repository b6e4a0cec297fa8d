"""A page in a real Chromium that calls the gateway of another origin."""

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import pytest

from gateway.keys import StoredKey, keys_in_force
from tests.fakes.running import DEADLINE_SECONDS, HOST, FakeReplica, kill_group
from tests.gateway.fleet import CHAT, STREAM, deployment, running_gateway
from tests.gateway.wire import length_in

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
KEYS = keys_in_force({"page": StoredKey(sha256=(sha256(b"qg-page").hexdigest(),))})
PAGE = """<!doctype html><script>
const key = {authorization: "Bearer qg-page"};
async function outcome(call) { try { return await call(); } catch (error) { return String(error.name); } }
(async () => {
  const models = await outcome(async () => {
    const answer = await fetch(GATEWAY + "/v1/models", {headers: key});
    return [answer.status, (await answer.json()).object, answer.headers.get("x-request-id") !== null];
  });
  const stream = await outcome(async () => {
    const headers = {...key, "content-type": "application/json", "x-stainless-lang": "js"};
    const answer = await fetch(GATEWAY + "/v1/chat/completions", {method: "POST", headers, body: JSON.stringify(BODY)});
    return [answer.status, (await answer.text()).endsWith("data: [DONE]\\n\\n"),
            answer.headers.get("x-quantgate-precision")];
  });
  const keyless = await outcome(async () => {
    const answer = await fetch(GATEWAY + "/v1/models");
    return [answer.status, (await answer.json()).error.code];
  });
  await fetch("/outcome", {method: "POST", body: JSON.stringify({models, stream, keyless})});
})();
</script>"""


@dataclass(slots=True)
class Site:
    """A web site whose page tells its outcome."""

    origin: str
    page: str
    outcome: "asyncio.Future[dict[str, Any]]"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request and close."""
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(length_in(head))
        if head.startswith(b"POST /outcome ") and not self.outcome.done():
            self.outcome.set_result(json.loads(body))
        text = self.page.encode() if head.startswith(b"GET / ") else b""
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\n")
        writer.write(b"content-length: %d\r\n\r\n%b" % (len(text), text))
        await writer.drain()
        writer.close()


@asynccontextmanager
async def running_site() -> AsyncIterator[Site]:
    """A site on a port of its own, which makes it an origin of its own."""
    site = Site("", "", asyncio.get_running_loop().create_future())
    server = await asyncio.start_server(site.serve, HOST, 0)
    site.origin = f"http://{HOST}:{server.sockets[0].getsockname()[1]}"
    try:
        yield site
    finally:
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def browsing(program: str, url: str) -> AsyncIterator[None]:
    """A browser with a profile of its own that shows a page while the block runs."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--no-proxy-server"]
        # It refuses to run as root with its sandbox.
        options += ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [program, *options, f"--user-data-dir={profile}", "--remote-debugging-port=0", url]
        nowhere = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(*command, start_new_session=True, stdout=nowhere, stderr=nowhere)
        try:
            yield
        finally:
            kill_group(process.pid)
            await process.wait()


async def test_a_page_of_another_origin(fake: FakeReplica) -> None:
    """With its origin permitted it lists models and reads a stream with its key; any other page reads nothing."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium; `apt-get install chromium-headless-shell` brings one")
    outcomes = []
    async with running_site() as permitted, running_site() as other:
        settings = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "cors": {"origins": [permitted.origin]}}
        async with running_gateway(deployment({"gateway": settings}, KEYS)) as fleet:
            with fleet.replicas(("hi", fake.url)):
                for site in (permitted, other):
                    site.page = PAGE.replace("GATEWAY", json.dumps(fleet.url)).replace("BODY", json.dumps(STREAM))
                    async with browsing(program, f"{site.origin}/"), asyncio.timeout(DEADLINE_SECONDS):
                        outcomes.append(await site.outcome)
                asked = len(fake.requests(CHAT))
                await fleet.at_rest()
    readable = {"models": [200, "list", True], "stream": [200, True, "bf16"], "keyless": [401, "invalid_api_key"]}
    assert outcomes == [readable, dict.fromkeys(readable, "TypeError")]
    assert asked
