"""From the key in a request's headers to its caller."""

import hashlib
import hmac
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from gateway.errors import InvalidKey
from gateway.keys.caller import ANONYMOUS, Caller


@dataclass(frozen=True, slots=True)
class Issued:
    """One live key: its SHA-256, who holds it, and when it ends (seconds since 1970)."""

    digest: bytes
    caller: Caller
    expires_seconds: float = math.inf


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys in force by their digest; None admits everybody, which configuration allows on loopback only."""

    issued: Mapping[bytes, Issued] | None = None

    def authenticate(self, headers: Mapping[bytes, bytes], now_seconds: float) -> Caller:
        """Tell who asks, by the wall clock's time; InvalidKey if its key is missing, unknown or expired."""
        if self.issued is None:
            return ANONYMOUS
        given = presented(headers)
        if not given:
            raise InvalidKey("no API key; send 'authorization: Bearer KEY'")
        digest = hashlib.sha256(given).digest()
        # What the look-up's time may tell is about digests, and nobody can choose a key by its digest.
        found = self.issued.get(digest)
        if found is None or not hmac.compare_digest(found.digest, digest):
            raise InvalidKey("the API key is not known here")
        if now_seconds >= found.expires_seconds:
            when = datetime.fromtimestamp(found.expires_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            raise InvalidKey(f"the API key {found.caller.name!r} expired at {when}; ask for another one")
        return found.caller

    def names(self) -> frozenset[str]:
        """Everybody who holds a key."""
        return frozenset(issued.caller.name for issued in (self.issued or {}).values() if issued.caller.name)


def presented(headers: Mapping[bytes, bytes]) -> bytes:
    """The key that a request shows: as OpenAI's clients do, else as Anthropic's, else as Azure's; empty: none."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and (token := token.strip()):
        return token
    return headers.get(b"x-api-key", b"").strip() or headers.get(b"api-key", b"").strip()
