"""Client of a running gateway's admin port, for the command line."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import httpx

from config.errors import ConfigError
from config.field_types import check_address
from config.load import load_settings

T = TypeVar("T")

TIMEOUT_SECONDS = 10.0
STATUS = "/admin/status"
# Where a listener on a wildcard address is reached from this machine.
LOOPBACK = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "": "127.0.0.1"}  # noqa: S104 - looked up, not listened on


def reachable(address: str) -> str:
    """Return the address by which a listener is reached from this machine."""
    host, _, port = address.rpartition(":")
    return f"{LOOPBACK.get(host, host)}:{port}"


class AdminUnavailable(Exception):
    """The admin port cannot be reached, or responded with an error."""


@dataclass(frozen=True, slots=True)
class AdminClient:
    """Address and key of an admin port; `file` is the configuration they were read from, for error messages."""

    address: str
    key: str | None
    file: Path

    @classmethod
    def of(cls, file: Path, address: str | None = None) -> "AdminClient":
        """Read address and key from a configuration; `address` overrides it, for example with a second worker's.

        With an address, there may be no such file: then there is no key. Raises ConfigError.
        """
        if address is not None:
            _check_option(address)
            if not file.exists():
                return cls(reachable(address), None, file)
        settings = load_settings(file).gateway
        chosen = address or settings.admin
        if chosen.endswith(":0"):
            raise ConfigError(f"{file}: gateway.admin has port 0; pass the actual address with --admin")
        key = settings.admin_key.get_secret_value() if settings.admin_key else None
        return cls(reachable(chosen), key, file)

    def read(self, path: str, query: Mapping[str, str] | None = None) -> bytes:
        """GET a path and return the body; ConfigError if the key is refused, else AdminUnavailable for any failure."""
        try:
            url = f"http://{self.address}{quote(path)}"
            response = httpx.get(url, params=query, headers=self._headers, timeout=TIMEOUT_SECONDS, trust_env=False)
        except httpx.RequestError as error:
            raise self._unreachable(error) from error
        return self._body(response)

    def decode(self, body: bytes, decoder: Callable[[bytes], T]) -> T:
        """Decode a body; AdminUnavailable if the decoder raises ValueError or ConfigError."""
        try:
            return decoder(body)
        except (ValueError, ConfigError) as error:
            what = f"{self.address} gives another answer than this quantgate knows ({error})"
            raise AdminUnavailable(
                f"{what}; pass the admin address of a gateway with --admin, and use the version of the gateway"
            ) from error

    def connection(self) -> httpx.AsyncClient:
        """Make a connection to read from repeatedly, on an event loop."""
        return httpx.AsyncClient(
            base_url=f"http://{self.address}", headers=self._headers, timeout=TIMEOUT_SECONDS, trust_env=False
        )

    async def read_by(self, connection: httpx.AsyncClient, path: str) -> bytes:
        """Do the same as `read`, by a connection."""
        try:
            response = await connection.get(quote(path))
        except httpx.RequestError as error:
            raise self._unreachable(error) from error
        return self._body(response)

    @property
    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def _unreachable(self, error: httpx.RequestError) -> AdminUnavailable:
        what = f"no gateway answers at {self.address} ({error or type(error).__name__})"
        return AdminUnavailable(f"{what}; start it, or pass its admin address with --admin")

    def _body(self, response: httpx.Response) -> bytes:
        if response.status_code == httpx.codes.UNAUTHORIZED:
            problem = "refuses gateway.admin_key" if self.key else "requires a key, but gateway.admin_key is not set"
            raise ConfigError(
                f"{self.file}: the gateway at {self.address} {problem}; is this another gateway's configuration?"
            )
        if response.status_code != httpx.codes.OK:
            raise AdminUnavailable(f"the gateway at {self.address} answers {response.status_code}: {_detail(response)}")
        return response.content


def _check_option(address: str) -> None:
    try:
        check_address(address)
    except ValueError as error:
        raise ConfigError(f"--admin: {error}") from error


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, LookupError, TypeError):
        return response.text[:200]
