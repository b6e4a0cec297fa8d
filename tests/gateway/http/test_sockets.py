"""Listening sockets of a service manager, and those of a predecessor."""

import os
import socket
from collections.abc import Iterator

import pytest

from config.errors import ConfigError
from gateway.http.sockets import (
    ADMIN,
    CLIENT,
    InheritedSockets,
    activated_sockets,
    address_of,
    bind,
    is_bound_to,
    sockets_of,
)
from tests.fakes.running import HOST


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """A socket that another process might have opened."""
    with bind(f"{HOST}:0", "test") as taken:
        yield taken


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "client"},
        {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "client"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"},
    ],
)
def test_sockets_of_nobody(environment: dict[str, str]) -> None:
    """Without sockets, or with those of another process, there are none."""
    assert activated_sockets(environment, os.getpid()) == InheritedSockets()


@pytest.mark.parametrize("names", ["quantgate-gateway.socket", "client:client", "client", ""])
def test_names_of_sockets(names: str) -> None:
    """Each has its own name, and a name says what it is for; the message says how to set it."""
    environment = {"LISTEN_PID": "7", "LISTEN_FDS": "2", "LISTEN_FDNAMES": names}
    with pytest.raises(ConfigError, match="set FileDescriptorName=client"):
        activated_sockets(environment, 7)


@pytest.mark.parametrize("name, next_acceptor", [(CLIENT, "next start"), (ADMIN, "none")])
def test_who_accepts_next(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch, name: str, next_acceptor: str
) -> None:
    """A client port that the gateway has opened itself is not there until the next start."""
    given = listening.dup()
    monkeypatch.setattr("gateway.http.sockets.FIRST_ACTIVATED_DESCRIPTOR", given.detach())
    environment = {"LISTEN_PID": "7", "LISTEN_FDS": "1", "LISTEN_FDNAMES": name}
    inherited = activated_sockets(environment, 7)
    assert inherited.next_acceptor == next_acceptor
    inherited.close_unused()


def test_a_socket_that_does_not_listen() -> None:
    """It is refused by its name, as is a descriptor that is no socket."""
    with socket.socket() as made, pytest.raises(ConfigError, match=r"\(client\) is no listening TCP socket"):
        sockets_of({CLIENT: made.dup().detach()})
    reading, writing = os.pipe()
    try:
        with pytest.raises(ConfigError, match=r"\(admin\) is no socket"):
            sockets_of({ADMIN: reading})
    finally:
        os.close(reading)
        os.close(writing)


def test_addresses(listening: socket.socket) -> None:
    """A socket is compared with a configured address, which may be a name, and have any port."""
    address = address_of(listening)
    assert is_bound_to(listening, address)
    assert is_bound_to(listening, f"{HOST}:0")
    assert is_bound_to(listening, address.replace(HOST, "localhost"))
    assert not is_bound_to(listening, f"{HOST}:1")
    assert not is_bound_to(listening, address.replace(HOST, "0.0.0.0"))
    assert not is_bound_to(listening, address.replace(HOST, "no-such-host.invalid"))


@pytest.mark.parametrize("match", [False, True])
def test_another_address(listening: socket.socket, caplog: pytest.LogCaptureFixture, match: bool) -> None:
    """A service manager's socket is used nevertheless, a predecessor's is left; both are told."""
    given = socket.socket(fileno=listening.dup().detach())
    inherited = InheritedSockets({CLIENT: given}, match=match)
    with bind("127.0.0.2:0", "test") as other:
        wanted = address_of(other)
    with inherited.take(CLIENT, wanted, "gateway.listen") as taken:
        assert address_of(taken) == (wanted if match else address_of(listening))
        inherited.close_unused(taken)
    assert given.fileno() == -1
    assert f"gateway.listen is {wanted}, but the inherited socket is on {address_of(listening)}" in caplog.text


def test_an_address_that_includes_the_one_of_the_predecessor(listening: socket.socket) -> None:
    """It can't be bound while that one listens: the message says who does, and what to do."""
    inherited = InheritedSockets({CLIENT: listening.dup()}, match=True)
    wanted = address_of(listening).replace(HOST, "0.0.0.0")
    with (
        pytest.raises(ConfigError, match=f"listens on {address_of(listening)}: if that is in the way, stop it"),
        inherited.take(CLIENT, wanted, "gateway.listen"),
    ):
        pass
