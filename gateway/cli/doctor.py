"""The command `doctor`, with what the gateway's validation says of a configuration among its findings."""

import asyncio
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from config.command_line import CommandParser
from config.errors import OptionError, Problem, SettingsError
from config.external_prices import PACKAGE
from config.schema import Settings
from gateway.deployment import read_deployment
from gateway.validation import validate
from serving import doctor_cli
from serving.app import Wanted
from serving.doctor.findings import Finding, Level
from serving.kubernetes.check import check_sources


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
        *(_external(report.settings) if report.settings else ()),
        *_pods(read_deployment(path).wanted),
        *(_finding("error", problem) for problem in report.unservable),
        *(_finding("warning", problem) for problem in report.warnings),
    ]


def _external(settings: Settings) -> Iterator[Finding]:
    """What external models are asked through, and what they may cost."""
    models = {name: variant for name, variant in settings.variants.items() if variant.external is not None}
    if models:
        yield Finding("ok", "litellm", f"{version(PACKAGE)}, loaded when the gateway starts")
    for name, variant in models.items():
        if variant.budget is None:
            yield Finding(
                "warning", f"variants.{name}", f"{variant.external} has no budget", "set budget: {usd_per_day: ...}"
            )
        else:
            yield Finding(
                "ok", f"variants.{name}", f"{variant.external}, {variant.budget.usd_per_day:g} USD a day at most"
            )


def _pods(wanted: Wanted) -> Iterator[Finding]:
    """Whether the pods of entries with `kubernetes` can be found."""
    if not wanted.pods:
        return
    try:
        access = wanted.cluster_access()
    except OptionError:
        return  # one of the warnings
    for check in asyncio.run(check_sources(access, wanted.pods)):
        subject = f"pods of {check.source.pod.variant}"
        if check.problem is None:
            yield Finding("ok", subject, f"{check.pods}, by the EndpointSlices with {check.source.selector}")
        else:
            yield Finding("error", subject, check.problem, "serving/README.md has the role that the gateway needs")


def _finding(level: Level, problem: Problem) -> Finding:
    where = f"{problem.file.name}:{problem.line}"
    return Finding(level, where, f"{problem.path}: {problem.what}", problem.hint)
