"""The keys file: YAML that maps a name to the SHA-256 digest of its key and to the key's limits."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, time
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from config.document import Document, dotted, read_document
from config.errors import Problem, SettingsError
from config.explain import Explainer
from config.field_types import PATTERNS, Name
from config.rules import Violation
from config.schema import NO_FLOOR, Floor
from gateway.keys.authentication import Caller, IssuedKey, Keys

SHAPE = "name: {sha256: ...}"
MAX_KEYS_PER_NAME = 2  # for rotation without a gap
DIGEST_PATTERN = r"^[0-9a-f]{64}$"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._@:/+-]*$"
FIELD_PATTERN = r"^[a-z][a-z0-9_]*$"
_PATTERNS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        **PATTERNS,
        DIGEST_PATTERN: ("is not a SHA-256 digest", "write 64 digits 0-9 a-f, as `quantgate keys create` does"),
        NAME_PATTERN: ("is not a valid key name", "use letters, digits and . _ @ : / + -"),
        FIELD_PATTERN: ("is not the name of a field", "use lower-case letters, digits and _"),
    }
)


def parse_digests(value: object) -> object:
    """Accept a single digest in place of a list."""
    return [value] if isinstance(value, str) else value


def parse_time(value: object) -> datetime:
    """Parse an ISO 8601 date (its first moment) or timestamp, in UTC if it has no offset; ValueError if invalid."""
    try:
        if isinstance(value, str):
            # YAML allows spaces before the offset.
            value = datetime.fromisoformat(re.sub(r"\s+(?=(?:Z|[+-]\d\d:?\d\d)$)", "", value))
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC)
        if isinstance(value, date):
            return datetime.combine(value, time.min, UTC)
    except (ValueError, OverflowError):
        pass
    raise ValueError("is not a date; write 2027-01-31 or 2027-01-31T12:00:00Z")


Digest = Annotated[str, Field(pattern=DIGEST_PATTERN)]
KeyName = Annotated[str, Field(pattern=NAME_PATTERN, max_length=128)]
FieldName = Annotated[str, Field(pattern=FIELD_PATTERN, max_length=128)]
Count = Annotated[int, Field(ge=1, le=10**12)]
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
    shadow: bool = True  # false: its answers are never scored on the new variant of a rollout


_Entries = dict[KeyName, StoredKey]
_FILE: TypeAdapter[_Entries] = TypeAdapter(_Entries)


def read_keys(path: Path) -> Keys:
    """Read a keys file for authentication; SettingsError lists all its problems."""
    return keys_in_force(read_stored(path))


def read_stored(path: Path) -> dict[str, StoredKey]:
    """Read the entries of a keys file; SettingsError lists all problems, without values: one may be a key.

    A file without any content is refused: it was truncated. `{}`, which `quantgate keys revoke` writes for the last
    key, admits nobody.
    """
    try:
        document = read_document(path, {})
    except SettingsError as error:
        how = f"create the file with `quantgate keys create NAME --file {path}`"
        raise SettingsError([_of_the_file(problem, how) for problem in error.problems]) from None
    try:
        stored = _FILE.validate_python(document.data)
    except ValidationError as error:
        found = [*Explainer(_Entries, patterns=_PATTERNS).violations(error)]
    else:
        found = [
            Violation((name, "sha256"), f"same key as {other}", "create one key per name")
            for name, other in shared_digests(stored)
        ]
    unread = {problem.path for problem in document.problems}
    placed = [_placed(document, violation) for violation in found]
    if problems := [*document.problems, *(problem for problem in placed if problem.path not in unread)]:
        raise SettingsError(sorted(problems, key=lambda problem: (problem.line, problem.column)))
    return stored


def _of_the_file(problem: Problem, how: str) -> Problem:
    """Name the keys in a problem of the whole file."""
    if problem.what.startswith("can't be read"):
        return replace(problem, what=f"keys {problem.what}", hint=how)
    if problem.what == "is empty":
        return replace(problem, hint=f"restore it, or {how}; {{}} stands for no keys: every request is refused")
    return problem


def _placed(document: Document, violation: Violation) -> Problem:
    hint = violation.hint
    if len(violation.location) <= 1 and violation.what.startswith("must be a mapping"):
        hint = f"write {SHAPE}"
    return document.problem(violation.location, violation.what, hint)


def keys_in_force(stored: Mapping[str, StoredKey]) -> Keys:
    """Make the keys for authentication; both keys of a name have the same caller."""
    issued = {}
    for name, key in stored.items():
        caller = _caller(name, key)
        ends = {"expires_seconds": key.expires.timestamp()} if key.expires else {}
        for digest in map(bytes.fromhex, key.sha256):
            issued[digest] = IssuedKey(digest, caller, **ends)
    return Keys(issued)


def problems(error: ValidationError, model: type[KeyLimits] = KeyLimits) -> list[str]:
    """Format validation errors of a model, one line per field."""
    found = Explainer(model, patterns=_PATTERNS).violations(error)
    return [f"{dotted(each.location)}: {each.what}{f'; {each.hint}' if each.hint else ''}" for each in found]


def plain_key(key: StoredKey) -> dict[str, object]:
    """Return what is stored of a key: what differs from the defaults, as JSON and YAML have it."""
    fields = key.model_dump(mode="json", exclude_defaults=True)
    digests = fields.pop("sha256")
    return {"sha256": digests if len(digests) > 1 else digests[0], **fields}


def shared_digests(stored: Mapping[str, StoredKey]) -> Iterator[tuple[str, str]]:
    """Yield the name of each key that another name has too, and that name."""
    names: dict[str, str] = {}
    for name, key in stored.items():
        for digest in key.sha256:
            if digest in names:
                yield name, names[digest]
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
        shadow=key.shadow,
    )
