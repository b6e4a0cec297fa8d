"""The command `doctor`, with what the gateway's validation says of a configuration among its findings."""

from pathlib import Path

from config.command_line import CommandParser
from config.errors import Problem, SettingsError
from gateway.validation import validate
from serving import doctor_cli
from serving.doctor.findings import Finding, Level


def doctor_parser() -> CommandParser:
    """Describe `quantgate doctor`."""
    return doctor_cli.doctor_parser()


def doctor_main(arguments: list[str]) -> int:
    """Print every finding with its fix; 0 without errors, 1 with some, 2 if the configuration is invalid."""
    return doctor_cli.doctor_main(arguments, validated)


def validated(path: Path) -> list[Finding]:
    """Return what is wrong with a configuration beyond this machine; SettingsError if it is invalid."""
    report = validate(path)
    if report.errors:
        raise SettingsError(list(report.errors))
    return [
        *(_finding("error", problem) for problem in report.unservable),
        *(_finding("warning", problem) for problem in report.warnings),
    ]


def _finding(level: Level, problem: Problem) -> Finding:
    where = f"{problem.file.name}:{problem.line}"
    return Finding(level, where, f"{problem.path}: {problem.what}", problem.hint)
