"""Who may call: names and SHA-256 digests of keys in a YAML file; no file, nobody is asked."""

import hashlib
import hmac
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from config.errors import ConfigError
from gateway.errors import InvalidKey

PREFIX = "qg-"


class StoredKey(BaseModel):
    """What is kept of a key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


_FILE = TypeAdapter(dict[str, StoredKey])


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys in force; None admits everybody, which configuration allows on loopback only."""

    digests: Mapping[str, str] | None = None

    def authenticate(self, headers: Mapping[str, str]) -> str | None:
        """Name the caller; InvalidKey if its key is missing or unknown."""
        if self.digests is None:
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not given:
            raise InvalidKey("no API key; send 'authorization: Bearer KEY'")
        digest = hashlib.sha256(given.encode()).hexdigest()
        # Every digest is compared, so that the time tells nothing about which one is near.
        callers = [name for name, known in self.digests.items() if hmac.compare_digest(known, digest)]
        if not callers:
            raise InvalidKey("the API key is not known here")
        return callers[0]


def read_keys(path: Path) -> Keys:
    """Read a keys file; ConfigError if it isn't one."""
    try:
        stored = _FILE.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except OSError as error:
        what = f"{path}: keys can't be read: {error.strerror}; make one with `quantgate keys create NAME --file {path}`"
        raise ConfigError(what) from error
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        raise ConfigError(f"{path}: is no keys file (name: {{sha256: ...}}): {str(error).splitlines()[0]}") from error
    return Keys({name: key.sha256 for name, key in stored.items()})


def create_key(path: Path, name: str) -> str:
    """Add a key to a file (made if it is missing, readable by its owner only) and return it; it is kept nowhere."""
    known = dict(read_keys(path).digests or {}) if path.exists() else {}
    if name in known:
        raise ConfigError(f"{path}: there is already a key named {name!r}; choose another name")
    key = PREFIX + secrets.token_urlsafe(32)
    known[name] = hashlib.sha256(key.encode()).hexdigest()
    text = yaml.safe_dump({each: {"sha256": digest} for each, digest in known.items()}, sort_keys=False)
    try:
        _write(path, text)
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror}") from error
    return key


def _write(path: Path, text: str) -> None:
    """Put a text in a file's place at once: half a keys file would lock its callers out."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp: mode 600
    with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor, no path
        file.write(text)
    Path(name).replace(path)
