"""What web pages may do: CORS where the operator permits it, and no request under a name that a page made up."""

from hashlib import sha256
from typing import Any

import httpx
import pytest

from gateway.http.cors import Cors
from gateway.http.hosts import allowed_hosts, host_name
from gateway.keys import Keys, StoredKey, keys_in_force
from tests.fakes.running import FakeReplica
from tests.gateway.fleet import CHAT, HELLO, STREAM, Fleet, deployment, running_gateway
from tests.gateway.wire import connected

LISTEN: dict[str, Any] = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0"}
PAGE = "https://chat.example.com"
ALLOW, EXPOSE = "access-control-allow-origin", "access-control-expose-headers"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}
KEYS = keys_in_force({"alice": StoredKey(sha256=(sha256(b"qg-alice").hexdigest(),))})
KEY = {"authorization": "Bearer qg-alice"}
asynchronous = pytest.mark.asyncio(loop_scope="session")


def permitting(*origins: str, keys: Keys | None = KEYS, **settings: Any) -> Any:
    """A deployment with keys that permits these origins."""
    cors = {"cors": {"origins": list(origins)}} if origins else {}
    return deployment({"gateway": {**LISTEN, **cors, **settings}}, keys)


@asynchronous
async def test_a_page_that_may_call(fake: FakeReplica) -> None:
    """Its preflight is answered without a key, and its requests, errors and streams are readable."""
    async with running_gateway(permitting("http://localhost:3000", PAGE)) as fleet:
        for path in (CHAT, "/v1/models", "/nowhere"):
            preflight = await fleet.client.options(path, headers=PREFLIGHT)
            assert (preflight.status_code, preflight.content) == (200, b"")
            assert preflight.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
            assert preflight.headers["access-control-allow-methods"] == "GET, HEAD, POST"
            assert preflight.headers["access-control-max-age"] == "7200"
            assert (preflight.headers[ALLOW], preflight.headers["vary"]) == (PAGE, "origin")
            assert "access-control-allow-credentials" not in preflight.headers
        with fleet.replicas(("hi", fake.url)):
            answers = [
                await fleet.ask(HELLO, {**KEY, "origin": PAGE}),
                await fleet.ask(STREAM, {**KEY, "origin": PAGE}),
                await fleet.ask(b"{", {**KEY, "origin": PAGE}),
                await fleet.ask(HELLO, {"origin": PAGE}),
                await fleet.client.get("/v1/models", headers={**KEY, "origin": PAGE}),
                await fleet.client.get("/nowhere", headers={**KEY, "origin": PAGE}),
            ]
    assert [answer.status_code for answer in answers] == [200, 200, 400, 401, 200, 404]
    for answer in answers:
        assert (answer.headers[ALLOW], answer.headers[EXPOSE], answer.headers["vary"]) == (PAGE, "*", "origin")


@asynchronous
@pytest.mark.parametrize("origin", ["https://evil.example", "null", f"{PAGE}.evil.example", "http://chat.example.com"])
async def test_a_page_that_may_not(origin: str) -> None:
    """It is told so before it sends anything, and may read nothing."""
    async with running_gateway(permitting(PAGE)) as fleet:
        preflight = await fleet.client.options(CHAT, headers={**PREFLIGHT, "origin": origin})
        listed = await fleet.client.get("/v1/models", headers={**KEY, "origin": origin})
    assert (preflight.status_code, preflight.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert listed.status_code == 200
    for answer in (preflight, listed):
        assert ALLOW not in answer.headers
        assert answer.headers["vary"] == "origin"


@asynchronous
async def test_any_page() -> None:
    """`*` permits every origin, in words that a cache may keep for all of them."""
    async with running_gateway(permitting("*")) as fleet:
        answers = [
            await fleet.client.options(CHAT, headers=PREFLIGHT),
            await fleet.client.get("/v1/models", headers={**KEY, "origin": "https://any.example"}),
        ]
    assert [(answer.status_code, answer.headers[ALLOW], "vary" in answer.headers) for answer in answers] == [
        (200, "*", False)
    ] * 2


@asynchronous
async def test_without_cors(fleet: Fleet) -> None:
    """By default no page is permitted, and OPTIONS is a method like any other."""
    preflight = await fleet.client.options(CHAT, headers=PREFLIGHT)
    listed = await fleet.client.get("/v1/models", headers={"origin": PAGE})
    assert (preflight.status_code, listed.status_code) == (405, 200)
    assert not [name for name in (*preflight.headers, *listed.headers) if name.startswith("access-control")]


@asynchronous
async def test_other_options_requests() -> None:
    """Only a preflight goes without a key."""
    async with running_gateway(permitting(PAGE)) as fleet:
        assert (await fleet.client.options(CHAT, headers={"origin": PAGE})).status_code == 401
        assert (await fleet.client.options(CHAT, headers={**KEY, "origin": PAGE})).status_code == 405


def test_headers_that_are_no_names_are_not_repeated() -> None:
    """What a preflight asks for is sent back only if it is a list of header names."""
    cors = Cors(frozenset({b"https://a.example"}))
    assert cors.headers(None) == b"vary: origin\r\n"
    assert not cors.permits(None)


async def statuses(address: str, path: str, hosts: tuple[str, ...]) -> list[int]:
    """The status for each value of Host; "" sends none."""
    found = []
    for host in hosts:
        async with connected(f"http://{address}") as peer:
            head = f"host: {host}\r\n" if host else ""
            version = "1.1" if host else "1.0"
            await peer.say(f"GET {path} HTTP/{version}\r\n{head}connection: close\r\n\r\n".encode())
            found.append(int((await peer.read_until(b"\r\n")).split()[1]))
    return found


OWN = ("127.0.0.1:1", "localhost", "LOCALHOST.:80", "app.localhost:8000", "[::1]:8000", "127.8.9.1", "")
FOREIGN = ("evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "[::2]:80", "a b")


@asynchronous
async def test_names_under_which_a_keyless_gateway_is_asked(fleet: Fleet) -> None:
    """On both ports loopback only: a page whose name was rebound to it has another name (DNS rebinding)."""
    addresses = fleet.served.addresses
    for address, path in ((addresses.client, "/v1/models"), (addresses.admin, "/metrics"), (addresses.admin, "/livez")):
        assert await statuses(address, path, OWN) == [200] * len(OWN)
        assert await statuses(address, path, FOREIGN) == [403] * len(FOREIGN)
    async with connected(f"http://{addresses.client}") as peer:
        await peer.say(b"GET http://evil.example/v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert (await peer.read_until(b"\r\n")).startswith(b"HTTP/1.1 403 ")


@asynchronous
async def test_names_of_the_configuration() -> None:
    """A proxy on the same machine may pass its own name on; with keys, the name does not matter."""
    hosts = ("LLM.example.com:443", "evil.example")
    async with running_gateway(permitting(keys=None, allowed_hosts=["llm.example.com"])) as fleet:
        for address, path in (
            (fleet.served.addresses.client, "/v1/models"),
            (fleet.served.addresses.admin, "/metrics"),
        ):
            assert await statuses(address, path, hosts) == [200, 403]
    async with running_gateway(permitting(admin_key="operators")) as fleet:
        assert await statuses(fleet.served.addresses.client, "/v1/models", hosts) == [401, 401]
        assert await statuses(fleet.served.addresses.admin, "/metrics", hosts) == [401, 401]
        assert await statuses(fleet.served.addresses.admin, "/livez", hosts) == [200, 200]


@pytest.mark.parametrize(
    "header, name",
    [(b"a:1", "a"), (b"A.", "a"), (b"[::1]", "[::1]"), (b"[::1]:8", "[::1]"), (b":80", ":80"), (b"", ""), (b"[", "[")],
)
def test_names_in_host(header: bytes, name: str) -> None:
    """A port and the final dot do not count."""
    assert host_name(header) == name


def test_the_usual_values_need_no_look() -> None:
    """They are those of a client on the same machine."""
    assert allowed_hosts("127.0.0.1:8000", ()).usual == {b"127.0.0.1:8000", b"localhost:8000", b"[::1]:8000"}


@asynchronous
@pytest.mark.parametrize("path", ["/metrics", "/livez", "/readyz", "/admin/replicas", "/nowhere"])
async def test_head_on_the_admin_port(fleet: Fleet, path: str) -> None:
    """HEAD gets the status and type of GET, and no body, as load balancers ask."""
    got, head = await fleet.admin.get(path), await fleet.admin.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-type"] == got.headers["content-type"]


@asynchronous
@pytest.mark.parametrize("path, admin", [("/v1/models", False), ("/livez", True), ("/admin/replicas", True)])
async def test_another_method_is_told_which_are_allowed(fleet: Fleet, path: str, admin: bool) -> None:
    """`allow` of a 405 names HEAD beside GET."""
    refused = await (fleet.admin if admin else fleet.client).request("PUT", path)
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")


@asynchronous
async def test_h2c_is_offered_to_the_gateway(fleet: Fleet, fake: FakeReplica) -> None:
    """An offer of HTTP/2 does not reach the replica, and neither do absolute URLs."""
    offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAAQCAAAAAAIAAAAA"}
    with fleet.replicas(("hi", fake.url)):
        assert (await fleet.ask(HELLO, offer)).status_code == 200
        assert not {"upgrade", "http2-settings"} & fake.requests(CHAT)[-1]["headers"].keys()
        async with httpx.AsyncClient(proxy=fleet.url, trust_env=False) as client:
            assert (await client.post(f"{fleet.url}{CHAT}", json=HELLO)).status_code == 200
