"""The keys file: YAML that maps a name to the SHA-256 digest of its key and to the key's limits."""

from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from config.errors import ConfigError
from config.rules import closest
from config.schema import NO_FLOOR, Floor, Name
from gateway.keys.authentication import Caller, IssuedKey, Keys

SHAPE = "name: {sha256: ...}"
MAX_KEYS_PER_NAME = 2  # for rotation without a gap


def parse_digests(value: object) -> object:
    """Accept a single digest in place of a list."""
    return [value] if isinstance(value, str) else value


def parse_time(value: object) -> datetime:
    """Parse an ISO 8601 date (its first moment) or timestamp, in UTC if it has no offset; ValueError if invalid."""
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC)
        if isinstance(value, date):
            return datetime.combine(value, time.min, UTC)
    except (ValueError, OverflowError):
        pass
    raise ValueError("is not a date; write 2027-01-31 or 2027-01-31T12:00:00Z")


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
KeyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@:/+-]*$", max_length=128)]
FieldName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=128)]
Count = Annotated[int, Field(strict=True, ge=1, le=10**12)]
Moment = Annotated[datetime, BeforeValidator(parse_time)]


class KeyLimits(BaseModel):
    """Limits of a key. An omitted limit does not apply; `may` is the exception: fields not listed are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    aliases: tuple[Name, ...] | None = None  # models (aliases and variants) it may use
    floor: Floor = NO_FLOOR
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrency: Count | None = None
    max_tokens: Count | None = None
    expires: Moment | None = None
    may: tuple[FieldName, ...] = ()


class StoredKey(KeyLimits):
    """Entry of the file: the digests of one key, or of two during a rotation (older one first), and their limits."""

    sha256: Annotated[
        tuple[Digest, ...], BeforeValidator(parse_digests), Field(min_length=1, max_length=MAX_KEYS_PER_NAME)
    ]


_FILE = TypeAdapter(dict[KeyName, StoredKey])


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys of a mapping: YAML would silently ignore the first of two entries with one name."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, "duplicate key", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_keys(path: Path) -> Keys:
    """Read a keys file for authentication; ConfigError lists all its problems."""
    return keys_in_force(read_stored(path))


def read_stored(path: Path) -> dict[str, StoredKey]:
    """Read the entries of a keys file; ConfigError lists all problems, without values: one may be a key."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
        stored = _FILE.validate_python({} if document is None else document)
    except OSError as error:
        how = f"create the file with `quantgate keys create NAME --file {path}`"
        raise ConfigError(f"{path}: keys can't be read: {error.strerror}; {how}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: is not a valid keys file ({SHAPE}): {error.problem}") from None
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems(error))) from None
    except (yaml.YAMLError, ValueError) as error:  # not UTF-8, or a date such as February 30
        raise ConfigError(f"{path}: is not a valid keys file ({SHAPE}): {str(error).splitlines()[0]}") from None
    if shared := list(_shared(stored)):
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in shared))
    return stored


def keys_in_force(stored: Mapping[str, StoredKey]) -> Keys:
    """Make the keys for authentication; both keys of a name have the same caller."""
    issued = {}
    for name, key in stored.items():
        caller = _caller(name, key)
        ends = {"expires_seconds": key.expires.timestamp()} if key.expires else {}
        for digest in map(bytes.fromhex, key.sha256):
            issued[digest] = IssuedKey(digest, caller, **ends)
    return Keys(issued)


def problems(error: ValidationError) -> list[str]:
    """Format validation errors of a keys file or of KeyLimits, one line per field."""
    return [_problem(item["type"], item["loc"], item["msg"]) for item in error.errors(include_input=False)]


def _problem(kind: str, location: tuple[int | str, ...], message: str) -> str:
    where = ".".join(map(str, location))
    if not location:
        return f"is not a valid keys file ({SHAPE})"
    if location[-1] == "[key]":
        return f"{where.removesuffix('.[key]')}: is not a valid key name; use letters, digits and . _ @ : / + -"
    if kind == "model_type" and len(location) == 1:
        return f"{where}: is not a valid entry ({SHAPE})"
    if kind == "extra_forbidden":
        known = Floor.model_fields if "floor" in location[:-1] else StoredKey.model_fields
        return f"{where}: unknown key; {closest(str(location[-1]), known)}"
    if kind == "missing":
        return f"{where}: is missing"
    return f"{where}: {message.removeprefix('Value error, ')}"


def _shared(stored: Mapping[str, StoredKey]) -> Iterator[str]:
    names: dict[str, str] = {}
    for name, key in stored.items():
        for digest in key.sha256:
            if digest in names:
                yield f"{name}.sha256: same key as {names[digest]}; create one key per name"
            names[digest] = name


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
