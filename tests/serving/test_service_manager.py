"""What a service manager is told, on a path and in the abstract namespace."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.service_manager import ServiceManager


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """The address in the environment, and the socket behind it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.setblocking(False)
        if request.param == "path":
            address = str(tmp_path / "notify")
            made.bind(address)
        else:
            made.bind("")
            address = "@" + made.getsockname().removeprefix(b"\0").decode()
        yield address, made


def test_states(listener: tuple[str, socket.socket]) -> None:
    """Each state is one datagram; a reload has the time at which it began."""
    address, received = listener
    manager = ServiceManager.of({"NOTIFY_SOCKET": address})
    manager.ready("listening on 127.0.0.1:8000")
    assert received.recv(4096) == b"READY=1\nSTATUS=listening on 127.0.0.1:8000"
    with manager.reloading("listening"):
        state, _, time = received.recv(4096).decode().partition("\nMONOTONIC_USEC=")
        assert (state, time.isdecimal()) == ("RELOADING=1", True)
    assert received.recv(4096) == b"READY=1\nSTATUS=listening"
    manager.stopping()
    assert received.recv(4096).startswith(b"STOPPING=1\n")


def test_nobody_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a service manager nothing is sent; one that is gone is a warning."""
    ServiceManager.of({}).ready("listening")
    assert caplog.text == ""
    ServiceManager(str(tmp_path / "gone")).ready("listening")
    assert "does not listen: No such file or directory" in caplog.text
