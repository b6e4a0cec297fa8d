"""The keys file: a YAML table from a name to the SHA-256 of its key and to how far the key reaches."""

from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from config.errors import ConfigError
from config.rules import closest
from config.schema import NO_FLOOR, Floor, Name
from gateway.keys.authentication import Issued, Keys
from gateway.keys.caller import Caller

SHAPE = "name: {sha256: ...}"
LIVE_KEYS = 2  # per name: the one in use, and the one that takes over


def as_digests(value: object) -> object:
    """Read one digest as a list of one."""
    return [value] if isinstance(value, str) else value


def as_time(value: object) -> datetime:
    """Read an ISO date (its beginning) or timestamp; UTC unless it says otherwise."""
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC)
        if isinstance(value, date):
            return datetime.combine(value, time.min, UTC)
    except (ValueError, OverflowError):
        pass
    raise ValueError("is no date; write 2027-01-31 or 2027-01-31T12:00:00Z")


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
KeyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@:/+-]*$", max_length=128)]
FieldName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=128)]
Count = Annotated[int, Field(strict=True, ge=1, le=10**12)]
Moment = Annotated[datetime, BeforeValidator(as_time)]


class KeyLimits(BaseModel):
    """How far a key reaches; what isn't said isn't limited, but for `may`: what isn't named is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    aliases: tuple[Name, ...] | None = None  # or variants
    floor: Floor = NO_FLOOR
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrency: Count | None = None
    max_tokens: Count | None = None
    expires: Moment | None = None
    may: tuple[FieldName, ...] = ()


class StoredKey(KeyLimits):
    """What is kept of a key, or of two while one takes over from the other, the older one first."""

    sha256: Annotated[tuple[Digest, ...], BeforeValidator(as_digests), Field(min_length=1, max_length=LIVE_KEYS)]


_FILE = TypeAdapter(dict[KeyName, StoredKey])


class _Loader(yaml.SafeLoader):
    """Refuses what is written twice: the first of two keys of one name would be out of force, and nobody told."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, "is written twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_keys(path: Path) -> Keys:
    """Read a keys file; ConfigError tells every problem of it."""
    return keys_in_force(read_stored(path))


def read_stored(path: Path) -> dict[str, StoredKey]:
    """Read what a keys file says; ConfigError tells every problem of it, and never a value, which may be a key."""
    try:
        said = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
        stored = _FILE.validate_python({} if said is None else said)
    except OSError as error:
        what = f"{path}: keys can't be read: {error.strerror}; make one with `quantgate keys create NAME --file {path}`"
        raise ConfigError(what) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: is no keys file ({SHAPE}): {error.problem}") from None
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems(error))) from None
    except (yaml.YAMLError, ValueError) as error:  # not UTF-8, or a date such as February 30
        raise ConfigError(f"{path}: is no keys file ({SHAPE}): {str(error).splitlines()[0]}") from None
    if shared := list(_shared(stored)):
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in shared))
    return stored


def keys_in_force(stored: Mapping[str, StoredKey]) -> Keys:
    """What requests are held against; both keys of a name stand for one caller."""
    issued = {}
    for name, key in stored.items():
        caller = _caller(name, key)
        ends = {"expires_seconds": key.expires.timestamp()} if key.expires else {}
        for digest in map(bytes.fromhex, key.sha256):
            issued[digest] = Issued(digest, caller, **ends)
    return Keys(issued)


def problems(error: ValidationError) -> list[str]:
    """Tell what is wrong with a keys file, or with terms, by name and field."""
    return [_problem(item["type"], item["loc"], item["msg"]) for item in error.errors(include_input=False)]


def _problem(kind: str, location: tuple[int | str, ...], message: str) -> str:
    where = ".".join(map(str, location))
    if not location:
        return f"is no keys file ({SHAPE})"
    if location[-1] == "[key]":
        return f"{where.removesuffix('.[key]')}: is no name; use letters, digits and . _ @ : / + -"
    if kind == "model_type" and len(location) == 1:
        return f"{where}: is no keys file's entry ({SHAPE})"
    if kind == "extra_forbidden":
        known = Floor.model_fields if "floor" in location[:-1] else StoredKey.model_fields
        return f"{where}: unknown key; {closest(str(location[-1]), known)}"
    if kind == "missing":
        return f"{where}: is missing"
    return f"{where}: {message.removeprefix('Value error, ')}"


def _shared(stored: Mapping[str, StoredKey]) -> Iterator[str]:
    holders: dict[str, str] = {}
    for name, key in stored.items():
        for digest in key.sha256:
            if digest in holders:
                yield f"{name}.sha256: {holders[digest]} has the same key; make each its own"
            holders[digest] = name


def _caller(name: str, key: StoredKey) -> Caller:
    return Caller(
        name=name,
        aliases=None if key.aliases is None else frozenset(key.aliases),
        floor=key.floor,
        max_tokens=key.max_tokens,
        requests_per_minute=key.requests_per_minute,
        tokens_per_minute=key.tokens_per_minute,
        concurrency=key.concurrency,
        may=frozenset(key.may),
    )
