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

    When it accepts connections, this process stops. Otherwise the service manager learns at the end of the block that
    the service does.
    """

    def commit(pid: int) -> None:
        log.info("process %d takes over", pid)
        taken.next_acceptor = "successor"
        manager.succeeded_by(pid)
        os.kill(os.getpid(), signal.SIGTERM)

    if control is not None:
        control.takeover = Takeover(sockets, commit)
    try:
        yield
    finally:
        if control is not None:
            control.takeover = None
        if taken.next_acceptor != "successor":
            manager.stopping()
