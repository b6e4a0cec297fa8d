"""Replicas behind TLS with a private CA, and replicas on Unix sockets."""

import asyncio
import datetime as dt
import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from config.errors import ConfigError
from config.schema import ReplicaSettings
from config.variant import PARENT_QUALITY, Variant
from gateway.deployment import read_deployment
from gateway.errors import UpstreamDisconnected, UpstreamError, UpstreamUnreachable
from gateway.process import gateway_alone
from gateway.proxy.upstream.pool import Pool
from gateway.routing.target import Timeouts
from serving.address import Address, address_of
from serving.clients import Clients
from serving.measuring.engine_facts import engine_facts
from serving.measuring.figures import Exchange
from serving.measuring.streaming import Target, complete
from serving.probe import Probe
from serving.replica import Replica, State, external_replicas
from serving.tls import Tls, read_tls
from tests.fakes.running import DEADLINE_SECONDS, HOST, POLL_SECONDS, FakeReplica
from tests.gateway.fleet import CONFIG, HELLO, STREAM, Fleet, clients, error_of, events_in, text_of
from tests.gateway.proxy.upstream.connecting import next_piece
from tests.gateway.wire import Flood, Peer, ScriptedReplica, answering, scripted, stream, whole

pytest.importorskip("cryptography", reason="needs cryptography to make certificates")
certificates = pytest.importorskip("tests.fakes.certificates")

pytestmark = pytest.mark.asyncio(loop_scope="session")

REQUEST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
EXPIRED = -dt.timedelta(hours=1)


def tls_of(folder: Path, **options: Any) -> Tls:
    """Read the TLS settings of a replica with these options."""
    settings = ReplicaSettings.model_validate({"variant": "hi", "url": "https://h", **options})
    return read_tls((settings,), folder)[0]


async def ask(pool: Pool, url: str, tls: Tls | None = None) -> bytes:
    """Send one request, and read its reply to the end."""
    with await pool.open(url, REQUEST, tls=tls) as connection:
        return await connection.read(2**20)


@asynccontextmanager
async def forwarding(
    fake: FakeReplica, *, secure: ssl.SSLContext | None = None, path: Path | None = None
) -> AsyncIterator[ScriptedReplica]:
    """Forward connections to a fake: from TLS, or from a Unix socket."""

    async def behaviour(peer: Peer) -> None:
        reader, writer = await asyncio.open_connection(HOST, fake.port)
        inner = Peer(reader, writer)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(copy(peer, inner))
                both.create_task(copy(inner, peer))
        except* (ConnectionError, TimeoutError):
            pass
        finally:
            inner.finish()

    async def copy(source: Peer, target: Peer) -> None:
        while data := await source.read_some():
            await target.say(data)
        raise ConnectionResetError

    async with scripted(behaviour, secure=secure, path=path) as replica:
        yield replica


@pytest.mark.parametrize(
    "url, address, root",
    [
        ("http://h:1", Address("h:1", "h", 1), "http://h:1"),
        ("http://h", Address("h", "h", 80), "http://h"),
        ("https://h", Address("h", "h", 443, secure=True), "https://h"),
        ("https://[::1]:8", Address("[::1]:8", "::1", 8, secure=True), "https://[::1]:8"),
        ("unix:///run/a%20b.sock", Address("localhost", path="/run/a b.sock"), "http://localhost"),
    ],
)
async def test_addresses(url: str, address: Address, root: str) -> None:
    """A url has the address to connect to, and the host of requests."""
    assert (address_of(url), address_of(url).root) == (address, root)


async def test_a_trusted_certificate(tmp_path: Path) -> None:
    """A certificate of the configured CA is trusted, and its connection is pooled."""
    authority = certificates.Authority(tmp_path, "ca")
    answers = answering(whole(b"1"), stream(b"2"), whole(b"3"), close=False)
    secure = authority.issue().server_context()
    async with scripted(answers, secure=secure) as replica, Pool() as pool:
        tls = tls_of(tmp_path, ca="ca.pem")
        assert [await ask(pool, replica.url, tls) for _ in range(3)] == [b"1", b"2", b"3"]
        assert len(replica.peers) == 1
        assert repr(pool) == f"<Pool [{replica.url}: 1 idle]>"


async def test_untrusted_certificates(tmp_path: Path) -> None:
    """Another CA, another host, an expired certificate, or no configured CA: unreachable for pool and probe."""
    authority, other = certificates.Authority(tmp_path, "ca"), certificates.Authority(tmp_path, "other")
    private_ca = tls_of(tmp_path, ca="ca.pem")
    for issued, tls in (
        (authority.issue(), tls_of(tmp_path, ca="other.pem")),
        (other.issue(), private_ca),
        (authority.issue("replica.example"), private_ca),
        (authority.issue("127.0.0.2"), private_ca),
        (authority.issue(valid_for=EXPIRED), private_ca),
        (authority.issue(), None),
    ):
        async with scripted(answering(whole(b"1")), secure=issued.server_context()) as replica, Pool() as pool:
            with pytest.raises(UpstreamUnreachable) as caught:
                await ask(pool, replica.url, tls)
            assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
            async with Probe() as probe:
                assert not await probe.healthy(replica.url, tls)


async def test_plain_http_on_a_port_with_tls(tmp_path: Path) -> None:
    """An http url of a port that speaks TLS fails as a disconnect."""
    secure = certificates.Authority(tmp_path, "ca").issue().server_context()
    async with scripted(answering(whole(b"1")), secure=secure) as replica, Pool() as pool, Probe() as probe:
        url = replica.url.replace("https:", "http:")
        with pytest.raises(UpstreamDisconnected):
            await ask(pool, url)
        assert not await probe.healthy(url)


async def test_a_client_certificate(tmp_path: Path) -> None:
    """A replica that requires a client certificate answers only with it."""
    authority, ours = certificates.Authority(tmp_path, "ca"), certificates.Authority(tmp_path, "ours")
    issued = ours.issue()
    secure = authority.issue().server_context(clients_of=ours)
    options = {"ca": "ca.pem", "certificate": issued.certificate.name, "key_file": issued.key.name}
    async with scripted(answering(whole(b"1")), secure=secure) as replica, Pool() as pool, Probe() as probe:
        assert await ask(pool, replica.url, tls_of(tmp_path, **options)) == b"1"
        assert await probe.healthy(replica.url, tls_of(tmp_path, **options))
        with pytest.raises(UpstreamError):
            await ask(pool, replica.url, tls_of(tmp_path, ca="ca.pem"))
        assert not await probe.healthy(replica.url, tls_of(tmp_path, ca="ca.pem"))


async def test_connections_are_pooled_by_tls_settings(tmp_path: Path) -> None:
    """A connection verified with one CA is not used for the same address with another."""
    authority = certificates.Authority(tmp_path, "ca")
    certificates.Authority(tmp_path, "other")
    secure = authority.issue().server_context()
    async with scripted(answering(whole(b"1"), close=False), secure=secure) as replica, Pool() as pool:
        await ask(pool, replica.url, tls_of(tmp_path, ca="ca.pem"))
        with pytest.raises(UpstreamUnreachable):
            await ask(pool, replica.url, tls_of(tmp_path, ca="other.pem"))


async def test_a_handshake_that_never_ends(tmp_path: Path) -> None:
    """A port that accepts and sends nothing is unreachable after `connect_seconds`."""

    async def behaviour(peer: Peer) -> None:
        await peer.left()

    certificates.Authority(tmp_path, "ca")
    async with scripted(behaviour) as replica, Pool() as pool:
        url = replica.url.replace("http:", "https:")
        with pytest.raises(UpstreamUnreachable) as caught:
            await pool.open(url, REQUEST, Timeouts(connect_seconds=0.05), tls_of(tmp_path, ca="ca.pem"))
        assert isinstance(caught.value.__cause__, TimeoutError)


async def test_one_context_for_a_file(tmp_path: Path) -> None:
    """Replicas with the same files share a context; only a changed file makes another value."""
    certificates.Authority(tmp_path, "ca")
    settings = ReplicaSettings(variant="hi", url="https://h", ca="ca.pem")
    plain = ReplicaSettings(variant="hi", url="http://h")
    first = read_tls((settings, plain, settings), tmp_path)
    assert set(first) == {0, 2}
    assert first[0] is first[2]
    assert first[0].context.check_hostname
    assert first[0].context.verify_mode is ssl.CERT_REQUIRED
    again = read_tls((settings,), tmp_path)
    assert again[0] == first[0]
    assert hash(again[0]) == hash(first[0])
    certificates.Authority(tmp_path, "ca")
    assert read_tls((settings,), tmp_path)[0] != first[0]
    variants = {"hi": Variant("hi", "bf16", PARENT_QUALITY)}
    found = external_replicas((settings, plain, settings), variants, first)
    assert [each.tls for each in found] == [first[0], None, first[0]]


async def test_invalid_files(tmp_path: Path) -> None:
    """A missing or invalid file is an error with the option that names it."""
    authority = certificates.Authority(tmp_path, "ca")
    ours, locked = authority.issue(), authority.issue(password=b"secret")
    (tmp_path / "empty.pem").touch()
    (tmp_path / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n")
    for options, words in (
        ({"ca": "none.pem"}, r"replicas\.0\.ca: .*none\.pem can't be read: No such file or directory"),
        ({"ca": "."}, r"replicas\.0\.ca: .* can't be read: Is a directory"),
        ({"ca": "empty.pem"}, r"replicas\.0\.ca: .*empty\.pem has no certificate"),
        ({"ca": "broken.pem"}, r"replicas\.0\.ca: .*broken\.pem has no certificate"),
        ({"ca": ours.key.name}, r"replicas\.0\.ca: .* has no certificate"),
        ({"certificate": "none.pem"}, r"replicas\.0\.certificate: .*none\.pem can't be read"),
        ({"certificate": "ca.pem"}, r"replicas\.0\.certificate: .*ca\.pem and its key can't be used"),
        ({"certificate": "ca.pem", "key_file": ours.key.name}, r"replicas\.0\.certificate: .* can't be used"),
        ({"certificate": ours.certificate.name, "key_file": "none"}, r"replicas\.0\.key_file: .* can't be read"),
        ({"certificate": locked.certificate.name, "key_file": locked.key.name}, "without a password"),
    ):
        with pytest.raises(ConfigError, match=words):
            tls_of(tmp_path, **options)


async def test_failover_from_an_untrusted_replica(fleet: Fleet, fake: FakeReplica, tmp_path: Path) -> None:
    """A wrong certificate makes a replica unreachable: the next one answers, or the client gets 502."""
    secure = certificates.Authority(tmp_path, "ca").issue().server_context()
    certificates.Authority(tmp_path, "other")
    async with scripted(answering(whole(b"{}")), secure=secure) as wrong:
        replica = Replica("hi-9", "hi", "bf16", wrong.url, "m1", tls=tls_of(tmp_path, ca="other.pem"))
        fleet.registry.put(replica, State.READY)
        try:
            answer = await fleet.ask()
            assert (answer.status_code, error_of(answer)["code"]) == (502, "upstream_unreachable")
            assert wrong.url not in answer.text
            with fleet.replicas(("lo", fake.url)):
                answer = await fleet.ask()
                assert answer.status_code == 200
                assert answer.headers["x-quantgate-replica"] == "lo-0"
        finally:
            fleet.registry.remove("hi-9")


def configured(folder: Path, **replica: Any) -> Path:
    """Write a configuration with one replica."""
    path = folder / "quantgate.yaml"
    settings = {"variant": "hi", **replica}
    gateway = {**CONFIG["gateway"], "limits": {"queue_seconds": DEADLINE_SECONDS}}
    path.write_text(yaml.safe_dump({**CONFIG, "gateway": gateway, "replicas": [settings]}))
    return path


async def state_becomes(admin: httpx.AsyncClient, state: str) -> None:
    """Wait until the only replica is in a state."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            (replica,) = (await admin.get("/admin/replicas")).json()
            if replica["state"] == state:
                return
            await asyncio.sleep(POLL_SECONDS)


async def check_answers(client: httpx.AsyncClient) -> None:
    """Request a unary answer and a stream, and check that they are the same."""
    reply = await client.post("/v1/chat/completions", json=HELLO)
    assert reply.status_code == 200, reply.text
    text = reply.json()["choices"][0]["message"]["content"]
    reply = await client.post("/v1/chat/completions", json=STREAM)
    assert events_in(reply.content)[-1] == "[DONE]"
    assert text_of(events_in(reply.content)) == text


@asynccontextmanager
async def alone(path: Path) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """Run a gateway in front of replicas that run elsewhere; yields a client for each of its ports."""
    async with gateway_alone(read_deployment(path), path) as addresses, clients(addresses) as both:
        yield both


@pytest.mark.parametrize("kind", ["unix", "https"])
async def test_end_to_end(kind: str, fake: FakeReplica, tmp_path: Path) -> None:
    """A gateway watches the replica, and answers from it over pooled connections."""
    secure = certificates.Authority(tmp_path, "ca").issue("localhost").server_context()
    listener: dict[str, Any] = {"secure": secure} if kind == "https" else {"path": tmp_path / "socket"}
    async with forwarding(fake, **listener) as replica:
        url = replica.url.replace(HOST, "localhost")
        path = configured(tmp_path, url=url, **({"ca": "ca.pem"} if kind == "https" else {}))
        async with alone(path) as (client, admin):
            await state_becomes(admin, "ready")
            await check_answers(client)
            before = len(replica.peers)
            for _ in range(3):
                await check_answers(client)
            assert len(replica.peers) == before


async def test_a_socket_that_is_removed_and_comes_back(fake: FakeReplica, tmp_path: Path) -> None:
    """Without the socket its replica is failed; with it, it is ready again."""
    socket = tmp_path / "socket"
    async with alone(configured(tmp_path, url=f"unix://{socket}")) as (client, admin):
        await state_becomes(admin, "failed")
        for _ in range(2):
            async with forwarding(fake, path=socket):
                await state_becomes(admin, "ready")
                await check_answers(client)
            socket.unlink(missing_ok=True)
            await state_becomes(admin, "failed")


async def test_certificates_are_read_at_a_reload(fake: FakeReplica, tmp_path: Path) -> None:
    """A file that cannot be read is refused; another CA in the file is trusted instead."""
    authority, _ = certificates.Authority(tmp_path, "right"), certificates.Authority(tmp_path, "ca")
    async with forwarding(fake, secure=authority.issue().server_context()) as replica:
        path = configured(tmp_path, url=replica.url, ca="ca.pem")
        async with alone(path) as (client, admin):
            await state_becomes(admin, "failed")
            configured(tmp_path, url=replica.url, ca="none.pem")
            await metrics_contain(admin, 'quantgate_config_reloads_total{outcome="refused"} 1.0')
            (tmp_path / "ca.pem").write_bytes(authority.file.read_bytes())
            configured(tmp_path, url=replica.url, ca="ca.pem")
            await state_becomes(admin, "ready")
            await check_answers(client)


async def metrics_contain(admin: httpx.AsyncClient, line: str) -> None:
    """Wait until the metrics have a line."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while line not in (await admin.get("/metrics")).text:  # noqa: ASYNC110 - waits for the gateway
            await asyncio.sleep(POLL_SECONDS)


@pytest.mark.parametrize("kind", ["unix", "https"])
async def test_every_control_request(kind: str, fake: FakeReplica, tmp_path: Path) -> None:
    """The probe and the measurements work, too, each over one connection."""
    secure = certificates.Authority(tmp_path, "ca").issue().server_context()
    listener: dict[str, Any] = {"secure": secure} if kind == "https" else {"path": tmp_path / "socket"}
    tls = tls_of(tmp_path, ca="ca.pem") if kind == "https" else None
    async with forwarding(fake, **listener) as forwarded:
        replica = Replica("hi-1", "hi", "bf16", forwarded.url, "m1", tls=tls)
        async with Probe() as probe:
            assert await probe.healthy(replica.url, replica.tls)
            assert (await probe.served_model(replica)).name == "m1"
            await probe.generate_one_token(replica)
            await probe.activity(replica)
            assert await probe.requests_in_engine(replica) == 0
            assert await probe.token_ids(replica, "a")
            assert await probe.prompt_end(replica, {})
            assert len(forwarded.peers) == 1
        async with aclosing(Clients(httpx.Timeout(DEADLINE_SECONDS))) as http_clients:
            client = http_clients.reaching(replica.url, replica.tls)
            assert (await engine_facts(client, replica.url)).version
            ongoing = Exchange(0.0, 1)
            await complete(Target(client, replica.url, "m1"), [65], 3, ongoing, lambda: None)
            assert (ongoing.failure, len(ongoing.chunks)) == (None, 3)
            assert len(forwarded.peers) == 2


@pytest.mark.parametrize("kind", ["unix", "https"])
async def test_backpressure_of_a_slow_reader(kind: str, tmp_path: Path) -> None:
    """What has not been read is bounded, and all of it arrives in the end, on a connection that is pooled."""
    flood = Flood(40 * 2**20)
    secure = certificates.Authority(tmp_path, "ca").issue().server_context()
    listener: dict[str, Any] = {"secure": secure} if kind == "https" else {"path": tmp_path / "socket"}
    tls = tls_of(tmp_path, ca="ca.pem") if kind == "https" else None
    async with scripted(flood, **listener) as replica, Pool() as pool:
        with await pool.open(replica.url, REQUEST, tls=tls) as connection:
            before = -1
            async with asyncio.timeout(DEADLINE_SECONDS):
                while before != flood.sent:
                    before = flood.sent
                    await asyncio.sleep(0.1)
            assert flood.sent < flood.total / 2
            size = 0
            while data := await next_piece(connection):
                size += len(data)
            assert size == flood.total
        assert repr(pool) == f"<Pool [{replica.url}: 1 idle]>"


@pytest.mark.parametrize("kind", ["unix", "https"])
async def test_replies_without_an_end(kind: str, tmp_path: Path) -> None:
    """An incomplete reply raises, as over plain HTTP."""
    secure = certificates.Authority(tmp_path, "ca").issue().server_context()
    listener: dict[str, Any] = {"secure": secure} if kind == "https" else {"path": tmp_path / "socket"}
    tls = tls_of(tmp_path, ca="ca.pem") if kind == "https" else None
    for sent in (b"", b"HTTP/1.1 2", whole(b"12")[:-1], stream(b"1")[:-5]):
        async with scripted(answering(sent), **listener) as replica, Pool() as pool:
            with pytest.raises(UpstreamDisconnected):
                await ask(pool, replica.url, tls)
        (tmp_path / "socket").unlink(missing_ok=True)
