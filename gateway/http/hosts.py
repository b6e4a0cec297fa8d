"""Refuses requests that a web page sends to a loopback port under a name of its own (DNS rebinding).

A page of http://evil.example:8000 may let its name resolve to 127.0.0.1; for the browser, the port then belongs to the
page's own origin, and no other rule stops it. The header `host` still has the page's name.
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from gateway.errors import NotAllowed


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """The names under which a port that needs no key may be addressed, besides those of loopback.

    `usual` are whole header values that are accepted without a closer look.
    """

    names: frozenset[str]
    usual: frozenset[bytes]

    def check(self, host: bytes | None) -> None:
        """Raise NotAllowed for a foreign name; a request without `host` (HTTP/1.0) is not from a browser."""
        if host is None or host in self.usual:
            return
        name = host_name(host)
        if name in self.names or is_loopback(name):
            return
        raise NotAllowed(
            f"the header host names {name[:100]!r}; without keys, a gateway on loopback accepts requests to loopback "
            "and to the names of gateway.allowed_hosts",
            code="host_not_allowed",
        )


def allowed_hosts(address: str, names: Iterable[str]) -> AllowedHosts:
    """Return the names for a port at `host:port`."""
    host, _, port = address.rpartition(":")
    usual = frozenset(f"{name}:{port}".encode() for name in ("127.0.0.1", "localhost", "[::1]", host))
    return AllowedHosts(frozenset(name.lower() for name in (*names, host)), usual)


def host_name(host: bytes) -> str:
    """Return the name in a `host` header: lower case, without port and final dot."""
    text = host.decode("latin-1").strip().lower()
    end = text.find("]") + 1 if text.startswith("[") else text.find(":")
    return (text[:end] if end > 0 else text).rstrip(".")


def is_loopback(name: str) -> bool:
    """Whether a name cannot be made to resolve to anything but loopback (RFC 6761, section 6.3)."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
