"""Where the listening sockets of a gateway come from, and how its successor gets them."""

import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gateway.http.sockets import InheritedSockets, NextAcceptor, activated_sockets
from serving.control import ControlSocket, Takeover
from serving.service_manager import ServiceManager
from serving.takeover import Predecessor, predecessor_of

log = logging.getLogger(__name__)


class Shared(Protocol):
    """Listening sockets on which another process may accept connections, too."""

    next_acceptor: NextAcceptor


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the listening sockets of a gateway come from; without a predecessor, from a service manager or nowhere."""

    sockets: InheritedSockets
    predecessor: Predecessor | None = None


@contextmanager
def origin_of(config: Path, environment: Mapping[str, str], takeover_home: Path | None) -> Iterator[Origin]:
    """Find the sockets; with `takeover_home`, those of the gateway that runs there with a configuration file.

    Raises ConfigError, or TakeoverRefused.
    """
    with predecessor_of(takeover_home, config) if takeover_home else nullcontext() as predecessor:
        if predecessor is None:
            yield Origin(activated_sockets(environment, os.getpid()))
        else:
            # Until `commit`, and if this process fails, the predecessor accepts the connections.
            yield Origin(InheritedSockets(predecessor.sockets, "successor", match=True), predecessor)


@contextmanager
def offered_to_successor(
    control: ControlSocket | None,
    sockets: Mapping[str, socket.socket],
    taken: Shared,
    manager: ServiceManager,
) -> Iterator[None]:
    """Let a successor get `sockets` through the control socket, if there is one, while the block runs.

    When it accepts connections, this process stops. If this process stops before, connections wait for the successor
    that starts: it will accept them, whereas this process would refuse new requests on the same socket. At the end of
    the block the service manager learns that the service does.
    """

    def commit(pid: int) -> None:
        log.info("process %d takes over", pid)
        taken.next_acceptor = "successor"
        os.kill(os.getpid(), signal.SIGTERM)

    if control is not None:
        control.takeover = Takeover(sockets, commit, takeover_refusal(taken.next_acceptor, manager))
    try:
        yield
    finally:
        if control is not None:
            if control.successor_starts:
                taken.next_acceptor = "successor"
            control.takeover = None
        manager.stopping()


def takeover_refusal(next_acceptor: NextAcceptor, manager: ServiceManager) -> str:
    """Return why a successor can't take a process over; empty if it can.

    When the main process of a unit ends, systemd starts the next one. It accepts no process outside of the unit's
    cgroup as the main process instead (`MAINPID=` in sd_notify(3)), so there would be two.
    """
    if manager.address or next_acceptor == "next start":
        return "a service manager runs it, and would start another one: use systemctl restart instead of --takeover"
    return ""
