"""What a report of usage covers, and the report itself: the answer of /admin/usage, which `quantgate usage` shows."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from types import MappingProxyType
from typing import cast, get_args

import msgspec

from serving.state.usage import Dimension, Usage, UsageGroup

VERSION = 1
HOUR_SECONDS = 3600
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
DEFAULT_BY, DEFAULT_SINCE = "key,alias,precision", "1d"
UNITS = MappingProxyType({"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400})


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Dimensions to group by, and hours since 1970: the first one, and the one after the last."""

    by: tuple[Dimension, ...]
    since_hour: int
    until_hour: int


class UsageLine(msgspec.Struct, frozen=True):
    """Usage of a group; `start` is the beginning of its hour or day. What it is not grouped by is None."""

    start: str | None
    key: str | None
    alias: str | None
    precision: str | None
    requests: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    external_cost_usd: float


class UsageReport(msgspec.Struct, frozen=True):
    """Usage of whole hours, from `since` to before `until`, RFC 3339 in UTC."""

    version: int
    since: str
    until: str
    by: tuple[Dimension, ...]
    rows: tuple[UsageLine, ...]
    total: UsageLine


def parse_query(by: str, since: str, until: str | None, now: float) -> UsageQuery:
    """Parse what a report covers; ValueError says what to write. `now` is in seconds since 1970."""
    since_hour = int(parse_time(since, now) // HOUR_SECONDS)
    until_hour = int(-(-(now if until is None else parse_time(until, now)) // HOUR_SECONDS))
    if until_hour <= since_hour:
        raise ValueError(f"until ({until or 'now'}) is not after since ({since})")
    return UsageQuery(parse_by(by), since_hour, until_hour)


def parse_by(text: str) -> tuple[Dimension, ...]:
    """Parse dimensions such as `key,alias`; empty: one group. ValueError if one is unknown."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in DIMENSIONS]:
        raise ValueError(f"{unknown[0]!r} is not a dimension of usage; write some of {', '.join(DIMENSIONS)}")
    if len(set(names)) < len(names) or {"day", "hour"} <= set(names):
        raise ValueError(f"{text!r} names a dimension twice, or both day and hour")
    return tuple(cast("Dimension", name) for name in names)


def parse_time(text: str, now: float) -> float:
    """Parse an age such as `90m`, `6h`, `1d` or `4w`, or a date or time of ISO 8601, UTC unless it has an offset."""
    if match := re.fullmatch(r"(\d{1,6})([mhdw])", text.strip()):
        return max(now - int(match[1]) * UNITS[match[2]], 0.0)
    try:
        moment = datetime.fromisoformat(text.strip())
        return max((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp(), 0.0)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a time; write 6h, 1d, 4w, 2026-11-01 or 2026-11-01T12:00") from None


def usage_report(query: UsageQuery, groups: Sequence[UsageGroup]) -> UsageReport:
    """Format groups as a report, with their total."""
    rows = tuple(_line(group) for group in groups)
    total = _line(UsageGroup(_sum(group.usage for group in groups)))
    return UsageReport(VERSION, _time(query.since_hour), _time(query.until_hour), query.by, rows, total)


def _sum(all_usage: Iterable[Usage]) -> Usage:
    usages = tuple(all_usage)
    return Usage(*(sum(getattr(usage, field.name) for usage in usages) for field in fields(Usage)))


def _line(group: UsageGroup) -> UsageLine:
    usage = group.usage
    return UsageLine(
        *(None if group.hour is None else _time(group.hour), group.key, group.alias, group.precision),
        *(usage.requests, usage.errors, usage.prompt_tokens, usage.completion_tokens),
        *(round(usage.seconds, 6), round(usage.external_cost_usd, 9)),
    )


def _time(hour: int) -> str:
    return datetime.fromtimestamp(hour * HOUR_SECONDS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
