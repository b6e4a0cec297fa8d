"""The command `config`: check or show a configuration file, or print the JSON schema."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import yaml

from config.command_line import CommandParser, add_config, chosen_config, exit_codes
from config.document import PASSWORD_IN_URL
from config.errors import ConfigError, Problem
from config.load import load_settings
from config.schema import Settings
from gateway.observability.access_log import AccessLogLine
from gateway.validation import Report, validate
from serving.foreground import USAGE

UNSERVABLE = 3  # exit code of `config check`: a model name that nobody can answer
CODES = exit_codes(2, code_0="done, or valid, warnings perhaps", code_3="check: an alias that nobody can answer")
CHECK = (
    "List all problems of a configuration file and of the files that it names: whatever gateway, up, serve and doctor "
    "would refuse, except ports that are in use and memory that is not free."
)


def config_main(arguments: list[str]) -> int:
    """Check or show a configuration file, or print the JSON schema; exit codes: 0, 2 invalid, 3 unservable alias."""
    parser = config_parser()
    options = parser.parse_args(arguments)
    if options.action == "schema":
        schema = msgspec.json.schema(AccessLogLine) if options.access_log else Settings.model_json_schema()
        print(json.dumps(schema, indent=2))
        return 0
    path = chosen_config(parser, options)
    if options.action == "check":
        report = validate(path, file_only=options.file_only)
        if options.json:
            print(json.dumps([_plain(level, problem) for level, problem in _levels(report)], indent=2))
        else:
            _print_text(path, report)
        return exit_code(report)
    try:
        settings = load_settings(path)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USAGE
    values = settings.model_dump(mode="json")
    if options.json:
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    else:
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    print(PASSWORD_IN_URL.sub(r"\1**********\2", text), end="")
    return 0


def exit_code(report: Report) -> int:
    """Return the exit code of `config check`."""
    if report.errors or report.launches:
        return USAGE
    return UNSERVABLE if report.unservable else 0


def config_parser() -> CommandParser:
    """Describe `quantgate config`."""
    parser = CommandParser(
        prog="quantgate config",
        description="Check a configuration file, show it with its defaults, or print the JSON schema.",
        examples=["quantgate config check quantgate.yaml"],
        epilog=CODES,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|show|schema")
    check = actions.add_parser(
        "check",
        help="list all problems of a file",
        description=CHECK,
        examples=["quantgate config check quantgate.yaml --json"],
        epilog=CODES,
    )
    check.add_argument("--json", action="store_true", help="print problems as a JSON array")
    check.add_argument(
        "--file-only",
        action="store_true",
        help="do not look at files, model directories and addresses: those of another machine",
    )
    text = "print a file with all defaults, secrets masked"
    show = actions.add_parser(
        "show",
        help=text,
        description=f"{text.capitalize()}.",
        examples=["quantgate config show quantgate.yaml", "quantgate config show quantgate.yaml --json"],
        epilog=CODES,
    )
    show.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    for action in (check, show):
        add_config(action)
    schema = actions.add_parser(
        "schema",
        help="print the JSON schema, for editors",
        examples=["quantgate config schema > quantgate.schema.json"],
        epilog=CODES,
    )
    schema.add_argument("--access-log", action="store_true", help="that of a line of the access log instead")
    return parser


def _levels(report: Report) -> list[tuple[str, Problem]]:
    """Return all problems, each with its level, in the order of the file."""
    levels = [
        *(("error", problem) for problem in (*report.errors, *report.launches)),
        *(("unservable", problem) for problem in report.unservable),
        *(("warning", problem) for problem in report.warnings),
    ]
    return sorted(levels, key=lambda pair: (pair[1].line, pair[1].column))


def _plain(level: str, problem: Problem) -> dict[str, Any]:
    return {"level": level, **dataclasses.asdict(problem), "file": str(problem.file)}


def _print_text(file: Path, report: Report) -> None:
    """Print problems to stderr, and a summary of a valid file to stdout."""
    for level, problem in _levels(report):
        print(f"{problem}{'' if level == 'error' else f' [{level}]'}", file=sys.stderr)
    if report.settings is None or report.errors or report.launches:
        return
    counts = {"unservable": len(report.unservable), "warnings": len(report.warnings)}
    result = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "no problems"
    settings = report.settings
    print(f"{file}: {len(settings.aliases)} aliases, {len(settings.variants)} variants, {result}")
