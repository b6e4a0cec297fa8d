"""TLS on the clients' port: what it offers, how a renewed certificate comes into use, and what is refused."""

import asyncio
import datetime as dt
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx2
import pytest
import yaml
from openai import AsyncOpenAI

from config.errors import ConfigError
from gateway.deployment import read_deployment
from gateway.http.interfaces import ClientTimeouts
from gateway.http.server import HttpServer, serve_clients
from gateway.http.sockets import address_of, bind
from gateway.http.tls import context_with
from gateway.process import gateway_alone
from gateway.validation import validate
from tests.fakes.certificates import DAY, Authority, Issued
from tests.fakes.running import DEADLINE_SECONDS, HOST, FakeReplica, eventually
from tests.gateway.fleet import HELLO, clients
from tests.gateway.http.echo_server import MEMORY_BYTES, Echo
from tests.gateway.test_reload_refused import Followed, document

pytestmark = pytest.mark.asyncio(loop_scope="session")

TLS = {"certificate": "server.pem", "key_file": "server.key"}


def install(folder: Path, issued: Issued, mode: int = 0o600) -> None:
    """Put a certificate where the configuration names it."""
    shutil.copyfile(issued.certificate, folder / TLS["certificate"])
    shutil.copyfile(issued.key, folder / TLS["key_file"])
    (folder / TLS["key_file"]).chmod(mode)


def configuration(folder: Path, url: str) -> Path:
    """A configuration file whose clients' port has TLS."""
    path = folder / "quantgate.yaml"
    path.write_text(yaml.safe_dump(document(url, tls=TLS)))
    return path


@asynccontextmanager
async def secured(folder: Path, url: str) -> AsyncIterator[tuple[str, Followed]]:
    """The address of a gateway with TLS, and its admin port, once its replica is ready."""
    path = configuration(folder, url)
    async with gateway_alone(read_deployment(path), path) as addresses, clients(addresses) as (client, admin):

        async def ready() -> bool:
            return (await admin.get("/readyz")).status_code == 200

        await eventually(ready)
        yield addresses.client, Followed(path, client, admin)


@asynccontextmanager
async def handshake(
    address: str, trust: ssl.SSLContext
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection after its handshake."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(DEADLINE_SECONDS):
        reader, writer = await asyncio.open_connection(host, int(port), ssl=trust, server_hostname=HOST)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def shown(address: str, trust: ssl.SSLContext) -> bytes:
    """The certificate that a new connection is shown."""
    async with handshake(address, trust) as (_, writer):
        certificate: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return certificate


async def test_the_sdk(tmp_path: Path, fake: FakeReplica) -> None:
    """Answers and streams are as without TLS; the connection is HTTP/1.1 by ALPN, and TLS 1.2 or later."""
    authority = Authority(tmp_path, "ca")
    install(tmp_path, authority.issue())
    trust = ssl.create_default_context(cafile=authority.file)
    async with (
        secured(tmp_path, fake.url) as (address, _),
        AsyncOpenAI(
            base_url=f"https://{address}/v1", api_key="any", http_client=httpx2.AsyncClient(verify=trust)
        ) as client,
    ):
        answer = await client.chat.completions.create(model="smol", messages=HELLO["messages"])
        assert answer.choices[0].finish_reason == "stop"
        stream = await client.chat.completions.create(model="smol", messages=HELLO["messages"], stream=True)
        assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "stop"
        trust.set_alpn_protocols(["h2", "http/1.1"])
        async with handshake(address, trust) as (_, writer):
            agreed = writer.get_extra_info("ssl_object")
            assert (agreed.selected_alpn_protocol(), agreed.version()) == ("http/1.1", "TLSv1.3")


async def test_a_renewed_certificate(tmp_path: Path, fake: FakeReplica) -> None:
    """New connections get it; open ones go on. A pair that does not match is refused, and the one before stays."""
    authority = Authority(tmp_path, "ca")
    first, second = authority.issue(), authority.issue(valid_for=2 * DAY)
    trust = ssl.create_default_context(cafile=authority.file)
    install(tmp_path, first)
    async with secured(tmp_path, fake.url) as (address, followed), handshake(address, trust) as (reader, writer):
        before = await shown(address, trust)
        shutil.copyfile(second.certificate, tmp_path / TLS["certificate"])
        await eventually(lambda: _reloads(followed, "refused", 1))
        assert await shown(address, trust) == before
        install(tmp_path, second)
        await eventually(lambda: _reloads(followed, "applied", 1))
        assert await shown(address, trust) != before
        writer.write(b"GET /health HTTP/1.1\r\nhost: %b\r\n\r\n" % HOST.encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        expiration = dt.datetime.now(dt.UTC) + 2 * DAY
        line = 'quantgate_certificate_expiration_timestamp_seconds{file="server.pem"} '
        lines = (await followed.admin.get("/metrics")).text.splitlines()
        [seconds] = [float(each.removeprefix(line)) for each in lines if each.startswith(line)]
        assert abs(seconds - expiration.timestamp()) < DAY.total_seconds() / 2


async def test_files_that_are_written_after_the_configuration(tmp_path: Path, fake: FakeReplica) -> None:
    """A configuration that names them is refused once, and comes into force when they are there."""
    authority = Authority(tmp_path, "ca")
    trust = ssl.create_default_context(cafile=authority.file)
    install(tmp_path, authority.issue())
    async with secured(tmp_path, fake.url) as (address, followed):
        before = await shown(address, trust)
        await followed.reloaded("refused", followed.path.read_text().replace("server.", "renewed."))
        issued = authority.issue()
        shutil.copyfile(issued.certificate, tmp_path / "renewed.pem")
        shutil.copyfile(issued.key, tmp_path / "renewed.key")
        await eventually(lambda: _reloads(followed, "applied", 1))
        assert await shown(address, trust) != before


async def _reloads(followed: Followed, outcome: str, count: int) -> bool:
    return await followed.reloads(outcome) >= count


async def test_a_client_that_only_half_closes(
    tmp_path: Path, fake: FakeReplica, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of a TLS connection in one direction ends it; asyncio has nothing to complain about."""
    authority = Authority(tmp_path, "ca")
    install(tmp_path, authority.issue())
    trust = ssl.create_default_context(cafile=authority.file)
    async with secured(tmp_path, fake.url) as (address, _), handshake(address, trust) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nhost: %b\r\n\r\n" % HOST.encode())
        await reader.readline()
        writer.close()
        await reader.read()
    assert "eof_received" not in caplog.text


async def test_a_handshake_that_does_not_end(tmp_path: Path) -> None:
    """A client that sends nothing, or no TLS, is disconnected as one that does not send its head."""
    authority = Authority(tmp_path, "ca")
    context = authority.issue().server_context()
    server = HttpServer(Echo(), MEMORY_BYTES, ClientTimeouts(head_seconds=0.1))
    with bind(f"{HOST}:0", "test") as taken:
        host, _, port = address_of(taken).rpartition(":")
        async with serve_clients(server, taken, 0, context_with(lambda: context)):
            for said in (b"", b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(said)
                async with asyncio.timeout(DEADLINE_SECONDS):
                    with suppress(ConnectionResetError):
                        assert not (await reader.read()).startswith(b"HTTP")
                writer.close()
            assert server.connections == 0


async def test_an_idle_client_that_reads_nothing(tmp_path: Path) -> None:
    """It does not end its direction of the connection, and is disconnected nevertheless, long before 30 s."""
    authority = Authority(tmp_path, "ca")
    context, trust = authority.issue().server_context(), ssl.create_default_context(cafile=authority.file)
    server = HttpServer(Echo(), MEMORY_BYTES, ClientTimeouts(keep_alive_seconds=0.1))
    with bind(f"{HOST}:0", "test") as taken:
        async with serve_clients(server, taken, 0, context_with(lambda: context)):
            with await asyncio.to_thread(connected, address_of(taken), trust):
                await eventually(lambda: server.connections == 0, DEADLINE_SECONDS)


def connected(address: str, trust: ssl.SSLContext) -> ssl.SSLSocket:
    """A connection that nobody reads from."""
    host, _, port = address.rpartition(":")
    return trust.wrap_socket(socket.create_connection((host, int(port))), server_hostname=HOST)


async def test_files_that_do_not_match(tmp_path: Path) -> None:
    """The start and `config check` name the option and what is wrong."""
    authority = Authority(tmp_path, "ca")
    install(tmp_path, authority.issue())
    shutil.copyfile(authority.issue().key, tmp_path / TLS["key_file"])
    path = configuration(tmp_path, "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"gateway.tls.certificate: .*can't be used together"):
        read_deployment(path)
    (tmp_path / TLS["key_file"]).unlink()
    [problem] = validate(path).errors
    assert (problem.path, problem.hint) == ("gateway.tls.key_file", "name a PEM file")


@pytest.mark.parametrize("mode, warnings", [(0o600, 0), (0o640, 0), (0o644, 1)])
async def test_a_key_that_everybody_can_read(tmp_path: Path, mode: int, warnings: int) -> None:
    """It is a warning."""
    install(tmp_path, Authority(tmp_path, "ca").issue(), mode)
    report = validate(configuration(tmp_path, "http://127.0.0.1:9"))
    assert not report.errors
    found = [(each.what, each.hint) for each in report.warnings if each.path == "gateway.tls"]
    key = tmp_path / TLS["key_file"]
    assert found == [(f"every user of this machine can read the private key in {key}", f"chmod o= {key}")] * warnings
