"""The verb `keys`: create, list, rotate, revoke."""

import argparse
import json
import os
import re
import stat
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from config.errors import ConfigError
from config.schema import Floor
from gateway.keys.issuing import create_key, revoke_key, revoke_old_key, rotate_key
from gateway.keys.stored import KeyLimits, StoredKey, parse_time, problems, read_stored
from serving.foreground import USAGE

DEFAULT_FILE = Path("keys.yaml")
AGES = {"d": timedelta(days=1), "h": timedelta(hours=1)}
NOT_THE_OWNERS_ALONE = stat.S_IRGRP | stat.S_IROTH
DIGEST_SHOWN = 8


def keys_main(arguments: list[str]) -> int:
    """Hand out, list, replace and revoke keys for clients; 2 for what can't be done, and nothing is changed."""
    chosen = _parser().parse_args(arguments)
    now = datetime.fromtimestamp(int(time.time()), UTC)
    try:
        if chosen.verb == "create":
            print(create_key(chosen.file, chosen.name, terms_of(chosen, now)))
        elif chosen.verb == "rotate":
            print(rotate_key(chosen.file, chosen.name))
        elif chosen.verb == "revoke":
            (revoke_old_key if chosen.old else revoke_key)(chosen.file, chosen.name)
        else:
            _list(chosen.file, now, as_json=chosen.json)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USAGE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantgate keys",
        description="Manage the keys that clients authenticate with. A key is printed once; the file keeps its "
        "SHA-256, and how far it reaches. Every change rewrites the file, without the comments in it and readable by "
        "its owner only; a gateway that runs takes it over by itself.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="create|list|rotate|revoke")
    create = _verb(verbs, "create", "make a key and print it; only its digest is kept", "who it is for")
    _add_terms(create)
    listing = _verb(verbs, "list", "names, digests, expiry and limits; never a key", None)
    listing.add_argument("--json", action="store_true", help="print a JSON array")
    _verb(verbs, "rotate", "make a second key for a name and print it; the first stays in force", "whose")
    revoke = _verb(verbs, "revoke", "remove a name with its keys", "whose")
    revoke.add_argument("--old", action="store_true", help="only the older one of its two keys")
    return parser


def _verb(verbs: Any, verb: str, text: str, name: str | None) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(verb, help=text, description=text[0].upper() + text[1:] + ".")
    if name is not None:
        parser.add_argument("name", metavar="NAME", help=name)
    parser.add_argument(
        "--file", type=Path, default=DEFAULT_FILE, help="the configuration's gateway.keys (default: %(default)s)"
    )
    return parser


def _add_terms(create: argparse.ArgumentParser) -> None:
    create.add_argument(
        "--alias",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="it may use this alias or variant, and only those named so",
    )
    create.add_argument(
        "--floor",
        nargs="+",
        action="extend",
        default=[],
        metavar="MEASURE=NUMBER",
        help=f"the least quality that may answer it: {', '.join(Floor.model_fields)}",
    )
    for option, text in (
        ("--requests-per-minute", "so many requests a minute"),
        ("--tokens-per-minute", "so many tokens a minute, of prompts and answers"),
        ("--concurrency", "so many requests at the same time"),
        ("--max-tokens", "so many tokens in one answer"),
    ):
        create.add_argument(option, type=int, metavar="N", help=text)
    create.add_argument(
        "--expires",
        metavar="WHEN",
        help="not accepted from then on: 2027-01-31 (0:00 UTC), 2027-01-31T12:00Z, 30d, 12h",
    )
    create.add_argument(
        "--may", nargs="+", action="extend", default=[], metavar="FIELD", help="guarded fields it may send"
    )


def terms_of(chosen: argparse.Namespace, now: datetime) -> KeyLimits:
    """Read the options of `create`; ConfigError tells every problem of them."""
    told = {
        "aliases": chosen.alias,
        "floor": dict(_measure(part) for part in chosen.floor),
        "requests_per_minute": chosen.requests_per_minute,
        "tokens_per_minute": chosen.tokens_per_minute,
        "concurrency": chosen.concurrency,
        "max_tokens": chosen.max_tokens,
        "expires": None if chosen.expires is None else expiry(chosen.expires, now),
        "may": chosen.may,
    }
    try:
        return KeyLimits.model_validate(told)
    except ValidationError as error:
        raise ConfigError("\n".join(f"quantgate keys create: {problem}" for problem in problems(error))) from None


def _measure(part: str) -> tuple[str, str]:
    measure, equals, value = part.partition("=")
    if not equals:
        raise ConfigError(f"quantgate keys create: floor: {part!r} has no number; write {measure}=0.97")
    return measure, value


def expiry(text: str, now: datetime) -> datetime:
    """Read a date, a timestamp, or a time from now such as 30d or 12h; ConfigError if it is none, or past."""
    age = re.fullmatch(r"([0-9]+)([dh])", text)
    try:
        when = now + int(age[1]) * AGES[age[2]] if age else parse_time(text)
    except (ValueError, OverflowError):
        raise ConfigError(f"quantgate keys create: expires: {text!r} is no date; write 2027-01-31 or 30d") from None
    if when <= now:
        raise ConfigError(f"quantgate keys create: expires: {text!r} is past; choose a later date")
    return when


def _list(path: Path, now: datetime, *, as_json: bool) -> None:
    stored = read_stored(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & NOT_THE_OWNERS_ALONE:
        print(f"{path}: others than its owner can read it (mode {mode:o}); chmod 600 {path}", file=sys.stderr)
    rows = [_row(name, key, now) for name, key in stored.items()]
    try:
        print(json.dumps(rows, indent=2) if as_json else _table(rows), flush=True)
    except BrokenPipeError:
        # Whoever read has enough; what Python still wants to flush at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [("NAME", "SHA256", "EXPIRES", "LIMITS"), *map(_cells, rows)]
    name, digests, expires = (max(len(line[column]) for line in lines) for column in range(3))
    return "\n".join(f"{line[0]:{name}}  {line[1]:{digests}}  {line[2]:{expires}}  {line[3]}" for line in lines)


def _row(name: str, key: StoredKey, now: datetime) -> dict[str, Any]:
    """One key as `list --json` tells it."""
    terms = key.model_dump(mode="json", exclude={"sha256"})
    terms["floor"] = {measure: limit for measure, limit in terms["floor"].items() if limit is not None}
    expired = key.expires is not None and key.expires <= now
    return {"name": name, "sha256": [digest[:DIGEST_SHOWN] for digest in key.sha256], **terms, "expired": expired}


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    expires = (row["expires"] or "never") + (" (expired)" if row["expired"] else "")
    limits = [f"aliases={','.join(row['aliases']) or 'none'}"] if row["aliases"] is not None else []
    limits += [f"floor.{measure}={limit}" for measure, limit in row["floor"].items()]
    counted = ("requests_per_minute", "tokens_per_minute", "concurrency", "max_tokens")
    limits += [f"{limit}={row[limit]}" for limit in counted if row[limit] is not None]
    limits += [f"may={','.join(row['may'])}"] if row["may"] else []
    return row["name"], ",".join(row["sha256"]), expires, " ".join(limits) or "none"
