"""The verb `doctor`: what this machine has, what is wrong with it, and how to mend it."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from config.command_line import CommandParser, add_config, exit_codes, given_config
from config.errors import ConfigError
from config.load import home_directory, process_environment
from serving.doctor.findings import Finding, findings, worst
from serving.doctor.reading import examine

FAILED, USAGE = 1, 2
STYLES = {"ok": "", "warning": "yellow", "error": "red"}


def doctor_main(arguments: list[str], validate: Callable[[Path], list[Finding]] = lambda _: []) -> int:
    """Print every finding with its fix; 0 without errors, 1 with some, 2 if the configuration is invalid.

    `validate` returns what is wrong with a configuration beyond this machine; it raises ConfigError if it is invalid.
    """
    parser = doctor_parser()
    chosen = parser.parse_args(arguments)
    try:
        config = given_config(parser, chosen)
        found = validate(config) if config else []
        found = [*findings(examine(home_directory(), process_environment(), config)), *found]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USAGE
    if chosen.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in found], indent=2))
    else:
        _show(found)
    return FAILED if worst(found) == "error" else 0


def doctor_parser() -> CommandParser:
    """Describe `quantgate doctor`."""
    parser = CommandParser(
        prog="quantgate doctor",
        description="Look at this machine as vLLM will: engine, CPU, GPUs, memory, limits. With a configuration, also "
        "at its addresses, and at whatever would keep its replicas from starting.",
        examples=["quantgate doctor quantgate.yaml"],
        epilog=exit_codes(2, code_0="no errors, warnings perhaps", code_1="errors"),
    )
    add_config(parser, "a configuration file")
    parser.add_argument("--json", action="store_true", help="print findings as JSON")
    return parser


def _show(found: list[Finding]) -> None:
    width = max(len(finding.subject) for finding in found)
    console = Console(highlight=False, soft_wrap=True)
    for finding in found:
        line = f"{finding.level:7}  {finding.subject:{width}}  {finding.what}"
        console.print(line, style=STYLES[finding.level], markup=False)
        if finding.fix:
            console.print(f"{'':7}  {'':{width}}  -> {finding.fix}", markup=False)
    counts = {level: sum(1 for finding in found if finding.level == level) for level in STYLES}
    print(f"\n{counts['error']} errors, {counts['warning']} warnings")
