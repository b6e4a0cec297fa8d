"""Listening sockets: bound here, or opened by another process and passed to this one.

=====================  ===================================  ==============================================
opened by              how the sockets come                 one that is not on the configured address
=====================  ===================================  ==============================================
this process           `bind`                               -
service manager        socket activation, sd_listen_fds(3)  is used, with a warning
predecessor            SCM_RIGHTS (`serving.takeover`)      is left, with a warning; another one is bound
parent of the workers  inherited file descriptors           is used, with a warning
=====================  ===================================  ==============================================

Closing a listening socket resets the connections that wait in its accept queue, unless another process has it open.
This is why sockets are handed over, and not bound again with SO_REUSEPORT: there each socket has a queue of its own.
"""

import logging
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from config.errors import ConfigError

log = logging.getLogger(__name__)

# The kernel lowers it to net.core.somaxconn (4096).
BACKLOG = 4096
FIRST_ACTIVATED_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
CLIENT, ADMIN = "client", "admin"
_NAME = re.compile(r"client|admin([2-9]|[1-9]\d+)?")


# Who accepts connections on the same sockets when this process stops: none, the process that a service manager starts
# next, for which they wait, or one that runs already.
NextAcceptor = Literal["none", "next start", "successor"]


@dataclass(slots=True)
class ListenSockets:
    """Sockets that listen; connections wait in them until the server is there.

    `next_acceptor` is set when a successor is known.
    """

    client: socket.socket
    admin: socket.socket
    next_acceptor: NextAcceptor = "none"


@dataclass(frozen=True, slots=True)
class InheritedSockets:
    """Listening sockets that another process opened, by name: `client`, `admin`, and `admin2`, ... of other workers.

    `match`: one that is not on the configured address is left.
    """

    by_name: Mapping[str, socket.socket] = field(default_factory=dict)
    next_acceptor: NextAcceptor = "none"
    match: bool = False

    @contextmanager
    def take(self, name: str, address: str, option: str) -> Iterator[socket.socket]:
        """Yield the socket of a name, or a new one on `address` if none can be used; ConfigError if that fails."""
        listening = self.by_name.get(name)
        if listening is not None and not is_bound_to(listening, address):
            log.warning("%s is %s, but the inherited socket is on %s", option, address, address_of(listening))
            if self.match:
                listening = _bind_beside(listening, address, option)
        with bind(address, option) if listening is None else listening as taken:
            yield taken

    def close_unused(self, *used: socket.socket) -> None:
        """Close the others: connections to a socket without an acceptor would wait for ever."""
        for listening in self.by_name.values():
            if listening not in used:
                listening.close()


def bind(address: str, option: str) -> socket.socket:
    """Bind and listen on `host:port` at once: a port in use is reported before anything else starts.

    `option` is the configuration key for the error message. Raises ConfigError.
    """
    host, port = _parts(address)
    listening = socket.socket(_family(host), socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        # With SO_REUSEADDR two sockets can bind the same port, but only one of them can listen.
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"{option}: can't listen on {address}: {error.strerror}; free the port or change {option}"
        ) from error
    return listening


def _bind_beside(inherited: socket.socket, address: str, option: str) -> socket.socket:
    """Close a predecessor's socket, which goes on listening there, and bind another address."""
    with inherited:
        try:
            return bind(address, option)
        except ConfigError as error:
            other = f"the gateway to be taken over listens on {address_of(inherited)}"
            raise ConfigError(
                f"{error}; {other}: if that is in the way, stop it, and start without --takeover"
            ) from error


def address_of(listening: socket.socket) -> str:
    """Return `host:port` of a listening socket, with the port that the kernel chose for port 0."""
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_bound_to(listening: socket.socket, address: str) -> bool:
    """Whether a socket listens on a configured address; port 0 stands for any."""
    host, port = _parts(address)
    actual_host, actual_port = listening.getsockname()[:2]
    if port not in (0, actual_port):
        return False
    try:
        found = socket.getaddrinfo(host, port, _family(host), socket.SOCK_STREAM)
    except OSError:
        return False
    return actual_host in {entry[4][0] for entry in found}


def activated_sockets(environment: Mapping[str, str], pid: int) -> InheritedSockets:
    """Take the sockets that a service manager passed to this process, see sd_listen_fds(3); without any, none.

    ConfigError if one has another name than `client` or `admin`, or is no listening TCP socket.
    """
    if environment.get("LISTEN_PID") != str(pid) or not environment.get("LISTEN_FDS", "").isdecimal():
        return InheritedSockets()
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    count = int(environment["LISTEN_FDS"])
    numbers = range(FIRST_ACTIVATED_DESCRIPTOR, FIRST_ACTIVATED_DESCRIPTOR + count)
    named = dict(zip(names, numbers, strict=False))
    if len(named) != count or not all(_NAME.fullmatch(name) for name in named):
        raise ConfigError(
            f"the socket unit passes {count} sockets named {':'.join(names)!r}; "
            f"set FileDescriptorName=client, and FileDescriptorName=admin in a second socket unit"
        )
    # A client port that this process opens ends with it.
    return InheritedSockets(sockets_of(named), "next start" if CLIENT in named else "none")


def sockets_of(descriptors: Mapping[str, int]) -> dict[str, socket.socket]:
    """Return the sockets of inherited file descriptors; ConfigError if one is no listening TCP socket."""
    return {name: _listening_socket(name, descriptor) for name, descriptor in descriptors.items()}


def _listening_socket(name: str, descriptor: int) -> socket.socket:
    try:
        inherited = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ConfigError(f"file descriptor {descriptor} ({name}) is no socket: {error.strerror}") from error
    is_tcp = inherited.family in (socket.AF_INET, socket.AF_INET6)
    if not is_tcp or not inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        inherited.close()
        raise ConfigError(f"file descriptor {descriptor} ({name}) is no listening TCP socket; set ListenStream=")
    inherited.set_inheritable(False)
    return inherited


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
