"""Ports: taken early, told clearly, given back."""

import socket

import httpx
import pytest
from fastapi import FastAPI

from config.errors import ConfigError
from gateway.http.listener import address_of, bind, listen
from tests.fakes.running import DEADLINE_SECONDS

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "[::1]:0"])
async def test_an_address(address: str) -> None:
    """IPv4, IPv6 and a name are served, and the real port is told."""
    app = FastAPI()

    @app.get("/")
    async def hello() -> str:
        return "hello"

    with bind(address, "gateway.listen") as taken:
        where = address_of(taken)
        assert not where.endswith(":0")
        assert where.startswith("[::1]:" if "::" in address else "127.0.0.1:")
        async with (
            listen(app, taken),
            httpx.AsyncClient(base_url=f"http://{where}", timeout=DEADLINE_SECONDS, trust_env=False) as client,
        ):
            answer = await client.get("/")
            assert (answer.json(), "server" in answer.headers) == ("hello", False)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((where.rpartition(":")[0].strip("[]"), int(where.rpartition(":")[2])))


async def test_a_port_in_use() -> None:
    """A port that somebody else has, is told with the option that names it, even before a server runs there."""
    with bind("127.0.0.1:0", "gateway.listen") as taken:
        address = address_of(taken)
        with pytest.raises(ConfigError) as caught:
            bind(address, "gateway.admin")
    assert str(caught.value) == (
        f"gateway.admin: can't listen on {address}: Address already in use; free the port or change gateway.admin"
    )


@pytest.mark.parametrize("address", ["192.0.2.1:8000", "no-such-host.invalid:8000"])
async def test_an_address_of_somebody_else(address: str) -> None:
    """An address that this machine doesn't have is told, too."""
    with pytest.raises(ConfigError, match=f"gateway.listen: can't listen on {address}: "):
        bind(address, "gateway.listen")


async def test_a_port_is_free_again_at_once() -> None:
    """A gateway that ended can start again on its port, though connections of its past are still known."""
    with bind("127.0.0.1:0", "gateway.listen") as taken:
        address = address_of(taken)
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as client:
            accepted, _ = taken.accept()
            accepted.close()
            assert client.recv(1) == b""
    bind(address, "gateway.listen").close()
