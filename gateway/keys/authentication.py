"""Authenticates a request by the API key in its headers."""

import hashlib
import hmac
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from gateway.errors import InvalidKey
from gateway.keys.caller import ANONYMOUS, Caller


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """One key in force: its SHA-256 digest, its caller, and its expiry in seconds since 1970."""

    digest: bytes
    caller: Caller
    expires_seconds: float = math.inf


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys in force, by SHA-256 digest.

    None: no authentication. The configuration allows that only if the client port listens on loopback.
    """

    issued: Mapping[bytes, IssuedKey] | None = None

    def authenticate(self, headers: Mapping[bytes, bytes], now_seconds: float) -> Caller:
        """Return the caller at a wall clock time; raises InvalidKey if the key is missing, unknown or expired."""
        if self.issued is None:
            return ANONYMOUS
        key = key_from(headers)
        if not key:
            raise InvalidKey("no API key; send 'authorization: Bearer KEY'")
        digest = hashlib.sha256(key).digest()
        # The lookup is not constant-time, but its timing depends on digests, and a key cannot be chosen by its digest.
        issued = self.issued.get(digest)
        if issued is None or not hmac.compare_digest(issued.digest, digest):
            raise InvalidKey("the API key is not known")
        if now_seconds >= issued.expires_seconds:
            when = datetime.fromtimestamp(issued.expires_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            raise InvalidKey(f"the API key {issued.caller.name!r} expired at {when}; ask the operator for a new one")
        return issued.caller

    def names(self) -> frozenset[str]:
        """Names of all keys."""
        return frozenset(issued.caller.name for issued in (self.issued or {}).values() if issued.caller.name)


def key_from(headers: Mapping[bytes, bytes]) -> bytes:
    """Read the key from the headers of OpenAI's, else Anthropic's, else Azure's clients; b"" without one."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and (token := token.strip()):
        return token
    return headers.get(b"x-api-key", b"").strip() or headers.get(b"api-key", b"").strip()
