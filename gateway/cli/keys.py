"""The command `keys`: create, import, list, rotate and revoke API keys, in a file or in the state database."""

import argparse
import json
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from config.command_line import DEFAULT_CONFIG, CommandParser, exit_codes
from config.errors import ConfigError
from config.load import load_settings
from config.schema import Floor
from gateway.keys.database import KeyDatabase
from gateway.keys.file import KeyFile
from gateway.keys.issuing import KeyStore, create_key, import_keys, revoke_key, revoke_old_key, rotate_key
from gateway.keys.stored import KeyLimits, StoredKey, parse_time, problems, read_stored
from serving.errors import StateAway
from serving.foreground import USAGE
from serving.state.database import StateDatabase, state_url

DEFAULT_FILE = Path("keys.yaml")
AGES = {"d": timedelta(days=1), "h": timedelta(hours=1)}
READABLE_BY_OTHERS = stat.S_IRGRP | stat.S_IROTH
DIGEST_CHARACTERS = 8
CODES = exit_codes(
    0, code_1="the state database is unavailable", code_2="usage or configuration error; the keys are unchanged"
)
FAILED = 1


def keys_main(arguments: list[str]) -> int:
    """Create, import, list, rotate or revoke keys; after an error they are unchanged."""
    parser = keys_parser()
    options = parser.parse_args(arguments)
    if options.file is not None and options.config is not None:
        parser.error("--file and --config both say where the keys are; give one of them")
    try:
        with key_store(options.file, options.config) as store:
            _change_or_list(store, options, datetime.fromtimestamp(int(time.time()), UTC))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USAGE
    except StateAway as away:
        print(f"quantgate keys: {away}", file=sys.stderr)
        return FAILED
    return 0


@contextmanager
def key_store(file: Path | None, config: Path | None) -> Iterator[KeyStore]:
    """Open the keys file that is given, or else where gateway.keys of the configuration says; by default keys.yaml."""
    if file is None and (config is not None or DEFAULT_CONFIG.exists()):
        config = config or DEFAULT_CONFIG
        gateway = load_settings(config).gateway
        if gateway.keys_in_database:
            database = StateDatabase.at(state_url(gateway.state, config.parent))
            try:
                yield KeyDatabase(database)
            finally:
                database.close()
            return
        file = config.parent / (gateway.keys_file or DEFAULT_FILE)
    yield KeyFile(file or DEFAULT_FILE)


def _change_or_list(store: KeyStore, options: argparse.Namespace, now: datetime) -> None:
    if options.action == "create":
        print(create_key(store, options.name, parse_limits(options, now)))
    elif options.action == "import":
        import_keys(store, read_stored(options.source))
    elif options.action == "rotate":
        print(rotate_key(store, options.name))
    elif options.action == "revoke":
        (revoke_old_key if options.old else revoke_key)(store, options.name)
    else:
        _list(store, now, as_json=options.json)


EXAMPLES = {
    "create": ("quantgate keys create alice --alias qwq-32b --floor top1_agreement=0.97 --requests-per-minute 60",),
    "import": ("quantgate keys import keys.yaml --config quantgate.yaml",),
    "list": ("quantgate keys list --json",),
    "rotate": ("quantgate keys rotate alice",),
    "revoke": ("quantgate keys revoke alice --old", "quantgate keys revoke alice"),
}


def keys_parser() -> CommandParser:
    """Describe `quantgate keys`."""
    parser = CommandParser(
        prog="quantgate keys",
        description="Manage the API keys of clients. A key is printed once; its SHA-256 digest and its limits are "
        "stored where gateway.keys of the configuration says: in a file, or in the state database (`database`). Every "
        "change rewrites the file, without its comments and readable by its owner only. Running gateways follow a "
        "change within a second.",
        examples=[
            "quantgate keys create alice --file keys.yaml",
            "quantgate keys create alice --config quantgate.yaml",
        ],
        epilog=CODES,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="create|import|list|rotate|revoke")
    create = _action(actions, "create", "create a key and print it; only its digest is stored", "name of the key")
    _add_limits(create)
    importing = _action(actions, "import", "add the keys of a keys file, with their digests and limits", None)
    importing.add_argument("source", type=Path, metavar="FILE", help="keys file; it is not changed")
    listing = _action(actions, "list", "list names, digests, expiry and limits; never keys", None)
    listing.add_argument("--json", action="store_true", help="print a JSON array")
    _action(actions, "rotate", "add a second key to a name and print it; the first stays valid", "name of the key")
    revoke = _action(actions, "revoke", "remove a name with its keys", "name of the key")
    revoke.add_argument("--old", action="store_true", help="remove only the older one of its two keys")
    return parser


def _action(actions: Any, action: str, text: str, name_help: str | None) -> argparse.ArgumentParser:
    description = text[0].upper() + text[1:] + "."
    parser: argparse.ArgumentParser = actions.add_parser(
        action, help=text, description=description, examples=EXAMPLES[action], epilog=CODES
    )
    if name_help is not None:
        parser.add_argument("name", metavar="NAME", help=name_help)
    parser.add_argument(
        "--file",
        type=Path,
        help="keys file (default: where gateway.keys of the configuration says, without one keys.yaml)",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=f"configuration file (default: {DEFAULT_CONFIG}, if it exists)"
    )
    return parser


def _add_limits(create: argparse.ArgumentParser) -> None:
    create.add_argument(
        "--alias",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="allow only these models (aliases or variants); default: all",
    )
    create.add_argument(
        "--floor",
        nargs="+",
        action="extend",
        default=[],
        metavar="MEASURE=NUMBER",
        help=f"quality floor of its requests: {', '.join(Floor.model_fields)}",
    )
    for option, text in (
        ("--requests-per-minute", "limit on requests per minute"),
        ("--tokens-per-minute", "limit on tokens per minute, of prompts and responses"),
        ("--concurrency", "limit on concurrent requests"),
        ("--max-tokens", "limit on tokens of one response"),
    ):
        create.add_argument(option, type=int, metavar="N", help=text)
    create.add_argument(
        "--expires",
        metavar="WHEN",
        help="expiry: 2027-01-31 (0:00 UTC), 2027-01-31T12:00Z, or from now: 30d, 12h; default: never",
    )
    create.add_argument(
        "--may", nargs="+", action="extend", default=[], metavar="FIELD", help="guarded engine fields that it may send"
    )


def parse_limits(options: argparse.Namespace, now: datetime) -> KeyLimits:
    """Read the limits from the options of `create`; ConfigError lists all problems."""
    limits = {
        "aliases": options.alias,
        "floor": dict(_parse_measure(part) for part in options.floor),
        "requests_per_minute": options.requests_per_minute,
        "tokens_per_minute": options.tokens_per_minute,
        "concurrency": options.concurrency,
        "max_tokens": options.max_tokens,
        "expires": None if options.expires is None else parse_expiry(options.expires, now),
        "may": options.may,
    }
    try:
        return KeyLimits.model_validate(limits)
    except ValidationError as error:
        raise ConfigError("\n".join(f"quantgate keys create: {problem}" for problem in problems(error))) from None


def _parse_measure(part: str) -> tuple[str, str]:
    measure, equals, value = part.partition("=")
    if not equals:
        raise ConfigError(f"quantgate keys create: floor: {part!r} is not MEASURE=NUMBER; write {measure}=0.97")
    return measure, value


def parse_expiry(text: str, now: datetime) -> datetime:
    """Parse a date, a timestamp, or a time from now such as 30d or 12h; ConfigError if it is invalid or past."""
    age = re.fullmatch(r"([0-9]+)([dh])", text)
    try:
        when = now + int(age[1]) * AGES[age[2]] if age else parse_time(text)
    except (ValueError, OverflowError):
        raise ConfigError(f"quantgate keys create: expires: {text!r} is not a date; write 2027-01-31 or 30d") from None
    if when <= now:
        raise ConfigError(f"quantgate keys create: expires: {text!r} is in the past; choose a later date")
    return when


def _list(store: KeyStore, now: datetime, *, as_json: bool) -> None:
    stored = store.read()
    if isinstance(store, KeyFile):
        _warn_of_readers(store.path)
    rows = [_row(name, key, now) for name, key in stored.items()]
    try:
        print(json.dumps(rows, indent=2) if as_json else _table(rows), flush=True)
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. /dev/null takes what Python still flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _warn_of_readers(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & READABLE_BY_OTHERS:
        print(f"{path}: readable by other users (mode {mode:o}); run chmod 600 {path}", file=sys.stderr)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [("NAME", "SHA256", "EXPIRES", "LIMITS"), *map(_cells, rows)]
    name, digests, expires = (max(len(line[column]) for line in lines) for column in range(3))
    return "\n".join(f"{line[0]:{name}}  {line[1]:{digests}}  {line[2]:{expires}}  {line[3]}" for line in lines)


def _row(name: str, key: StoredKey, now: datetime) -> dict[str, Any]:
    """Build a key's object of `list --json`; a digest is shortened to DIGEST_CHARACTERS."""
    limits = key.model_dump(mode="json", exclude={"sha256"})
    limits["floor"] = {measure: limit for measure, limit in limits["floor"].items() if limit is not None}
    expired = key.expires is not None and key.expires <= now
    digests = [digest[:DIGEST_CHARACTERS] for digest in key.sha256]
    return {"name": name, "sha256": digests, **limits, "expired": expired}


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    expires = (row["expires"] or "never") + (" (expired)" if row["expired"] else "")
    limits = [f"aliases={','.join(row['aliases']) or 'none'}"] if row["aliases"] is not None else []
    limits += [f"floor.{measure}={limit}" for measure, limit in row["floor"].items()]
    numeric = ("requests_per_minute", "tokens_per_minute", "concurrency", "max_tokens")
    limits += [f"{limit}={row[limit]}" for limit in numeric if row[limit] is not None]
    limits += [f"may={','.join(row['may'])}"] if row["may"] else []
    return row["name"], ",".join(row["sha256"]), expires, " ".join(limits) or "none"
