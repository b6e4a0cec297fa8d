"""Authenticates a request by the API key in its headers: its caller, with the limits of the key."""

import hashlib
import hmac
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from config.schema import NO_FLOOR, Floor
from gateway.errors import InvalidKey, KeysUnavailable, NotAllowed


@dataclass(frozen=True, slots=True)
class Caller:
    """Name and limits of an API key. A limit of None does not apply; `name` is None if no keys are configured.

    `rate_limited`: there is a limit per minute; `limited`: there is one, or one of concurrent requests.
    """

    name: str | None = None
    aliases: frozenset[str] | None = None  # models (aliases and variants) it may use; None: all
    floor: Floor = NO_FLOOR
    max_tokens: int | None = None  # of one response
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    may: frozenset[str] = frozenset()  # guarded engine fields it may send
    shadow: bool = True  # its answers may be scored on the new variant of a rollout
    rate_limited: bool = field(init=False)
    limited: bool = field(init=False)

    def __post_init__(self) -> None:
        rate_limited = self.requests_per_minute is not None or self.tokens_per_minute is not None
        # Derived once: every request asks several times.
        object.__setattr__(self, "rate_limited", rate_limited)
        object.__setattr__(self, "limited", rate_limited or self.concurrency is not None)

    def allows(self, model: str) -> bool:
        """Whether the caller may use a model name."""
        if self.aliases is None or model in self.aliases:
            return True
        # ALIAS@VARIANT belongs to the alias.
        return "@" in model and model.rpartition("@")[0] in self.aliases

    def check_model(self, model: str) -> None:
        """Raise NotAllowed unless the caller may use a model name.

        Called before the name is looked up: the response does not reveal which names exist.
        """
        if not self.allows(model):
            names = ", ".join(sorted(self.aliases or ())) or "none"
            raise NotAllowed(
                f"the key {self.name!r} may not use the model {model[:100]!r}; it may use: {names}", param="model"
            )


# Without keys, every caller may use all models but no guarded field.
ANONYMOUS = Caller()


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """One key in force: its SHA-256 digest, its caller, and its expiry in seconds since 1970."""

    digest: bytes
    caller: Caller
    expires_seconds: float = math.inf


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys in force, by SHA-256 digest.

    None: no authentication. The configuration allows that only if the client port listens on loopback. `known` is false
    until the keys in the state database have been read once.
    """

    issued: Mapping[bytes, IssuedKey] | None = None
    known: bool = True

    def authenticate(self, headers: Mapping[bytes, bytes], now_seconds: float) -> Caller:
        """Return the caller at a wall clock time; raises InvalidKey if the key is missing, unknown or expired.

        KeysUnavailable: a key is there, but the keys are not known yet.
        """
        if self.issued is None:
            return ANONYMOUS
        key = key_from(headers)
        if not key:
            raise InvalidKey("no API key; send 'authorization: Bearer KEY'")
        digest = hashlib.sha256(key).digest()
        # The lookup is not constant-time, but its timing depends on digests, and a key cannot be chosen by its digest.
        issued = self.issued.get(digest)
        if issued is None or not hmac.compare_digest(issued.digest, digest):
            if not self.known:
                raise KeysUnavailable("the API keys could not be read from the state database yet; retry")
            raise InvalidKey("the API key is not known")
        if now_seconds >= issued.expires_seconds:
            when = datetime.fromtimestamp(issued.expires_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            raise InvalidKey(f"the API key {issued.caller.name!r} expired at {when}; ask the operator for a new one")
        return issued.caller

    def replaced_by(self, other: "Keys") -> bool:
        """Return whether none of these keys, of which there are some, is in `other`, neither by name nor by digest.

        No key at all, which a keys file says as `{}`, takes the place of nothing: all keys were revoked.
        """
        if not self.issued or not other.issued:
            return False
        return self.issued.keys().isdisjoint(other.issued) and self.names().isdisjoint(other.names())

    def names(self) -> frozenset[str]:
        """Names of all keys."""
        return frozenset(issued.caller.name for issued in (self.issued or {}).values() if issued.caller.name)


# Nobody is admitted until the keys have been read.
UNKNOWN_KEYS = Keys({}, known=False)


def key_from(headers: Mapping[bytes, bytes]) -> bytes:
    """Read the key from the headers of OpenAI's, else Anthropic's, else Azure's clients; b"" without one."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and (token := token.strip()):
        return token
    return headers.get(b"x-api-key", b"").strip() or headers.get(b"api-key", b"").strip()
