"""HTTP clients of the control path: one for each socket or set of certificates, closed together."""

import ssl
from dataclasses import dataclass, field

import httpx

from serving.address import address_of
from serving.tls import Tls

PLENTY = httpx.Limits(max_connections=None)


@dataclass(slots=True)
class Clients:
    """Owns the clients that replicas are reached with, until it is closed."""

    timeout: httpx.Timeout
    _clients: dict[tuple[str, Tls | None], httpx.AsyncClient] = field(default_factory=dict)

    def reaching(self, url: str, tls: Tls | None = None) -> httpx.AsyncClient:
        """Return the client for an address; the URLs of its requests begin with `root_of`."""
        key = (address_of(url).path, tls)
        client = self._clients.get(key)
        if client is None:
            client = self._clients[key] = _client(*key, self.timeout)
        return client

    async def aclose(self) -> None:
        """Close them all."""
        clients = tuple(self._clients.values())
        self._clients.clear()
        for client in clients:
            await client.aclose()


def root_of(url: str) -> str:
    """Return the beginning of the URLs of requests to a replica."""
    return address_of(url).root


def _client(path: str, tls: Tls | None, timeout: httpx.Timeout) -> httpx.AsyncClient:
    if path:
        # Unix socket: no TLS. An empty context avoids loading the system CA bundle.
        no_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        transport = httpx.AsyncHTTPTransport(uds=path, verify=no_tls, limits=PLENTY)
        return httpx.AsyncClient(transport=transport, timeout=timeout, trust_env=False)
    # The system's CAs, as in the gateway; httpx alone would use those of certifi.
    trust = tls.context if tls else ssl.create_default_context()
    return httpx.AsyncClient(verify=trust, timeout=timeout, limits=PLENTY, trust_env=False)
