"""The verbs of this room: serve, ps, logs."""

import os
import sys
from contextlib import AbstractAsyncContextManager
from difflib import get_close_matches

from config.command_line import CommandParser, add_config, chosen_config, exit_codes
from config.errors import ConfigError
from config.load import home_directory, load_settings, process_environment
from serving.app import read_wanted, replicas_alone
from serving.errors import StateAway
from serving.foreground import USAGE, run_until_signal
from serving.logs import follow_log, log_files, read_end
from serving.machine import this_machine
from serving.ps import Listing, print_once, watch
from serving.registry import Registry
from serving.replica import own_keys
from serving.state.database import StateDatabase, state_url

FAILED = 1
DEFAULT_LINES = 50


def serve_main(arguments: list[str]) -> int:
    """Run this machine's replicas."""
    parser = serve_parser()
    config = chosen_config(parser, parser.parse_args(arguments))
    home, environment = home_directory(), process_environment()

    def start() -> AbstractAsyncContextManager[None]:
        return replicas_alone(read_wanted(config), this_machine(home, environment), Registry(), home, config)

    return run_until_signal(start)


def serve_parser() -> CommandParser:
    """Describe `quantgate serve`."""
    parser = CommandParser(
        prog="quantgate serve",
        description="Run the replicas of a configuration on this machine and publish them to the state database "
        "(gateway.state), where `quantgate gateway` finds them. One per home directory ($QUANTGATE_HOME).",
        examples=["quantgate serve quantgate.yaml"],
        epilog=exit_codes(0, 2, 4),
    )
    add_config(parser)
    return parser


def ps_main(arguments: list[str]) -> int:
    """List the replicas that supervisors have published."""
    parser = ps_parser()
    chosen = parser.parse_args(arguments)
    config = chosen_config(parser, chosen)
    try:
        settings = load_settings(config)
        database = StateDatabase.at(state_url(settings.gateway.state, config.parent), create=False)
    except ConfigError as error:
        print(f"quantgate: {error}", file=sys.stderr)
        return USAGE
    listing = Listing(database, own_keys(settings.replicas))
    try:
        (watch if chosen.watch else print_once)(listing, as_json=chosen.json, wide=chosen.wide)
    except StateAway as error:
        print(f"quantgate: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        _discard_output()
    finally:
        database.close()
    return 0


def ps_parser() -> CommandParser:
    """Describe `quantgate ps`."""
    parser = CommandParser(
        prog="quantgate ps",
        description="List the replicas that `quantgate serve` and `quantgate up` run, as the state database has them, "
        "with the requests in each engine. On a terminal, a long reason is cut at the end of its line. Replicas with a "
        "url are not in it: the gateway's /admin/replicas shows those, too.",
        examples=["quantgate ps --watch", "quantgate ps quantgate.yaml --json"],
        epilog=exit_codes(0, 2, code_1="the state database is unavailable"),
    )
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON array")
    parser.add_argument("-w", "--watch", action="store_true", help="go on until Ctrl-C; with --json a line a change")
    parser.add_argument(
        "--wide", action="store_true", help="all columns, whole: variant, host, address and process too"
    )
    return parser


def logs_main(arguments: list[str]) -> int:
    """Print what a replica printed."""
    chosen = logs_parser().parse_args(arguments)
    files = log_files(home_directory() / "logs")
    if chosen.replica not in files:
        print(f"quantgate logs: {_unknown(chosen.replica, list(files))}", file=sys.stderr)
        return USAGE
    try:
        with files[chosen.replica].open("rb") as log:
            sys.stdout.buffer.write(read_end(log, chosen.lines))
            sys.stdout.buffer.flush()
            if chosen.follow:
                follow_log(log, files[chosen.replica], sys.stdout.buffer)
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        print(f"quantgate logs: {files[chosen.replica]}: {error.strerror}", file=sys.stderr)
        return FAILED
    return 0


def logs_parser() -> CommandParser:
    """Describe `quantgate logs`."""
    parser = CommandParser(
        prog="quantgate logs",
        description="Print the end of a replica's log ($QUANTGATE_HOME/logs/REPLICA.log).",
        examples=["quantgate logs qwq-int4-1 --follow"],
        epilog=exit_codes(0, code_1="the log can't be read", code_2="usage error, or no such log"),
    )
    parser.add_argument("replica", metavar="REPLICA", help="as `quantgate ps` names it")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as it grows, until Ctrl-C")
    parser.add_argument("-n", "--lines", type=_count, default=DEFAULT_LINES, help="how many (default: %(default)s)")
    return parser


def _discard_output() -> None:
    """Send what Python still flushes at exit to /dev/null: the reader, such as `head`, has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unknown(name: str, known: list[str]) -> str:
    if not known:
        return f"there is no log of {name!r}, nor of any other replica, in {home_directory() / 'logs'}"
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no log of {name!r}; {hint}known: {', '.join(known)}"


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise ValueError
    return count
