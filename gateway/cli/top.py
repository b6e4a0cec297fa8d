"""`quantgate top`: the status of a gateway in a terminal."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

import msgspec
from rich.console import Console

from config.command_line import DEFAULT_CONFIG, CommandParser, exit_codes
from config.errors import ConfigError
from gateway.cli.admin_client import STATUS, AdminClient, AdminUnavailable
from gateway.cli.top_tables import heading, sections
from gateway.status.values import Status, read_status
from serving.foreground import USAGE

DONE, FAILED = 0, 1
WIDTH_WITHOUT_TERMINAL = 160


def top_main(arguments: list[str]) -> int:
    """Show the status until `q` is pressed, or once."""
    options = top_parser().parse_args(arguments)
    try:
        client = AdminClient.of(options.config, options.admin)
        if options.once or options.json:
            return _once(client, as_json=options.json)
        _complain_without_terminal()
        # Imported here: textual takes a third of a second, and needs a terminal.
        run = import_module("gateway.cli.top_app").run
        problem: str | None = run(client, lambda body: decoded(body, client), options.interval)
    except (ConfigError, AdminUnavailable) as error:
        print(f"quantgate top: {error}", file=sys.stderr)
        return USAGE if isinstance(error, ConfigError) else FAILED
    if problem is not None:
        print(f"quantgate top: {problem}", file=sys.stderr)
        return USAGE
    return DONE


def top_parser() -> CommandParser:
    """Describe `quantgate top`."""
    parser = CommandParser(
        prog="quantgate top",
        description="Show the status of a running gateway, live: aliases with their ladders and who answers now, "
        "traffic by precision, replicas, rollouts, the latest errors. It is what the page /ui of the admin port shows. "
        "Keys: q quits, p pauses, r reads again, Tab and the arrows scroll.",
        examples=["quantgate top --config quantgate.yaml", "quantgate top --once --json"],
        epilog=exit_codes(0, 2, code_1="no gateway answers, with --once"),
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--admin", metavar="HOST:PORT", help="admin port to ask, for example of another worker; default: gateway.admin"
    )
    parser.add_argument(
        "--interval", type=_interval, default=1.0, metavar="SECONDS", help="between two reads (default: %(default)g)"
    )
    parser.add_argument("--once", action="store_true", help="print the status once, without a screen")
    parser.add_argument("--json", action="store_true", help="print it once, as the JSON of /admin/status")
    return parser


def _interval(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 0.1 to 3600")
    return seconds


def _complain_without_terminal() -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("this is no terminal; use --once, or --once --json")


def _once(client: AdminClient, *, as_json: bool) -> int:
    body = client.read(STATUS)
    status = decoded(body, client)
    if as_json:
        print(msgspec.json.format(body).decode())
        return DONE
    console = Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)
    console.print(heading(status, client.address))
    for title, content in sections(status):
        console.print(f"\n[bold]{title}[/bold]")
        console.print(content)
    return DONE


def decoded(body: bytes, client: AdminClient) -> Status:
    """Decode a status; AdminUnavailable if the gateway is of another version."""
    return client.decode(body, read_status)
