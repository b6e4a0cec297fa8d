"""How the command line asks a gateway that runs, on its admin port."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx

from config.errors import ConfigError
from config.load import load_settings

DEADLINE_SECONDS = 10.0
# What a listener that takes connections from everywhere is reached by from here.
HERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "": "127.0.0.1"}  # noqa: S104 - looked up, not listened on


class AdminUnavailable(Exception):
    """No gateway answers, or not what was asked."""


@dataclass(frozen=True, slots=True)
class AdminClient:
    """Where a gateway's operators ask, and what they show; `file` is where that is written."""

    address: str
    key: str | None
    file: Path

    @classmethod
    def of(cls, file: Path, address: str | None = None) -> "AdminClient":
        """Read it from a configuration; the address may be another one, for example a second worker's."""
        settings = load_settings(file).gateway
        host, _, port = (address or settings.admin).rpartition(":")
        if port == "0":
            raise ConfigError(f"{file}: gateway.admin has no port of its own; say where it listens with --admin")
        key = settings.admin_key.get_secret_value() if settings.admin_key else None
        return cls(f"{HERE.get(host, host)}:{port}", key, file)

    def read(self, path: str) -> bytes:
        """Fetch a path; ConfigError if the key is refused, AdminAway if nothing comes of it otherwise."""
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            url = f"http://{self.address}{quote(path)}"
            answer = httpx.get(url, headers=headers, timeout=DEADLINE_SECONDS, trust_env=False)
        except httpx.TransportError as error:
            what = f"no gateway answers at {self.address} ({error or type(error).__name__})"
            raise AdminUnavailable(f"{what}; start it, or say with --admin where it listens") from error
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            said = "refuses gateway.admin_key" if self.key else "asks for a key, but there is no gateway.admin_key"
            raise ConfigError(f"{self.file}: the gateway at {self.address} {said}; is it another one's file?")
        if answer.status_code != httpx.codes.OK:
            raise AdminUnavailable(f"the gateway at {self.address} answers {answer.status_code}: {_said(answer)}")
        return answer.content


def _said(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, LookupError, TypeError):
        return answer.text[:200]
