"""Which processes a successor can take over."""

import pytest

from gateway.handover import takeover_refusal
from gateway.http.sockets import NextAcceptor
from serving.service_manager import ServiceManager


@pytest.mark.parametrize(
    "next_acceptor, address, refused",
    [("none", "", False), ("successor", "", False), ("none", "@systemd", True), ("next start", "", True)],
)
def test_who_is_not_taken_over(next_acceptor: NextAcceptor, address: str, refused: bool) -> None:
    """A process with sockets of a service manager, or that tells one its state."""
    assert bool(takeover_refusal(next_acceptor, ServiceManager(address))) == refused
