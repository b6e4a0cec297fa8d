"""`quantgate usage`: what requests used, by key, alias and precision."""

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from config.command_line import DEFAULT_CONFIG, CommandParser, exit_codes
from config.errors import ConfigError
from gateway.cli.admin_client import AdminClient, AdminUnavailable
from gateway.observability.usage_report import DEFAULT_BY, DEFAULT_SINCE, UsageLine, UsageReport, parse_query
from serving.foreground import USAGE

DONE, FAILED = 0, 1
COUNTS = ("requests", "errors", "prompt_tokens", "completion_tokens", "seconds", "external_cost_usd")


def usage_main(arguments: list[str]) -> int:
    """Print usage."""
    parser = usage_parser()
    options = parser.parse_args(arguments)
    try:
        parse_query(options.by, options.since, options.until, time.time())
    except ValueError as error:
        parser.error(str(error))
    try:
        report = _read(options)
    except ConfigError as error:
        print(f"quantgate usage: {error}", file=sys.stderr)
        return USAGE
    except AdminUnavailable as error:
        print(f"quantgate usage: {error}", file=sys.stderr)
        return FAILED
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    elif options.csv:
        _print_csv(report)
    else:
        _print_table(report)
    return DONE


def usage_parser() -> CommandParser:
    """Describe `quantgate usage`."""
    parser = CommandParser(
        prog="quantgate usage",
        description="Print requests, tokens, seconds and external cost, added up over whole hours and over all "
        "gateways that share the state database. A running gateway is asked; what other workers have counted is at "
        "most 10 s old.",
        examples=[
            "quantgate usage --by key,alias",
            "quantgate usage --by day,key --since 2026-11-01 --until 2026-12-01 --csv",
        ],
        epilog=exit_codes(0, 2, code_1="no gateway answers, or the state database is unavailable"),
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--admin", metavar="HOST:PORT", help="admin port to ask; default: gateway.admin")
    parser.add_argument(
        "--by", default=DEFAULT_BY, metavar="NAMES", help="some of key,alias,precision,day,hour (default: %(default)s)"
    )
    parser.add_argument(
        "--since", default=DEFAULT_SINCE, metavar="TIME", help="6h, 1d, 4w or 2026-11-01, UTC (default: %(default)s)"
    )
    parser.add_argument("--until", metavar="TIME", help="the same, exclusive (default: now)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON, with the total")
    output.add_argument("--csv", action="store_true", help="print CSV")
    return parser


def _read(options: argparse.Namespace) -> UsageReport:
    query = {"by": options.by, "since": options.since, **({"until": options.until} if options.until else {})}
    client = AdminClient.of(options.config, options.admin)
    return client.decode(client.read("/admin/usage", query), msgspec.json.Decoder(UsageReport).decode)


def columns(report: UsageReport) -> tuple[str, ...]:
    """The fields of a row that a report has."""
    return (*("start" if name in ("day", "hour") else name for name in report.by), *COUNTS)


def _print_csv(report: UsageReport) -> None:
    writer, names = csv.writer(sys.stdout, lineterminator="\n"), columns(report)
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in report.rows)


def _print_table(report: UsageReport) -> None:
    names = columns(report)
    table = Table(box=None, pad_edge=False, title=None)
    for name in names:
        table.add_column(name.replace("_", " "), justify="right" if name in COUNTS else "left")
    for row in report.rows:
        table.add_row(*(_text(row, name) for name in names))
    if report.by and report.rows:
        table.add_row(*(_text(report.total, name) if name in COUNTS else "" for name in names), style="bold")
    print(f"{report.since} to {report.until}", file=sys.stderr)
    Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200).print(table, highlight=False, markup=False)


def _text(row: UsageLine, name: str) -> str:
    value: Any = getattr(row, name)
    if name in ("seconds", "external_cost_usd"):
        return f"{value:,.2f}" if name == "seconds" else f"{value:,.4f}"
    return f"{value:,}" if name in COUNTS else str(value)
