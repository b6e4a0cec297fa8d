"""Where a replica listens: a host and port, with TLS or without, or a socket in the file system."""

from dataclasses import dataclass
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True, slots=True)
class Address:
    """What to connect to. `authority` goes into the `host` header; `path` is a unix socket's, which has no port."""

    authority: str
    host: str = ""
    port: int = 0
    secure: bool = False
    path: str = ""

    @property
    def root(self) -> str:
        """The base URL for an HTTP client; it gets the socket of a unix address separately."""
        return f"{'https' if self.secure else 'http'}://{self.authority}"


def address_of(url: str) -> Address:
    """Read `http://host:port`, `https://host:port` or `unix:///path/to/socket`."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return Address("localhost", path=unquote(parts.path))
    secure = parts.scheme == "https"
    return Address(parts.netloc, parts.hostname or "", parts.port or (443 if secure else 80), secure)
