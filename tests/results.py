"""Results of pytest runs, read from JUnit XML files, and the summary that ends `python -m tests.run`."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree as ET

Outcome = Literal["passed", "failed", "skipped"]

SLOWEST = 20
# Folders whose subfolders have lines of their own.
SPLIT = ("tests", "gateway")


@dataclass(frozen=True, slots=True)
class Result:
    """One test; its seconds include the set-up of the fixtures that it is the first to use."""

    folder: str
    name: str
    seconds: float
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Lane:
    """One pytest command: its wall time, whether it failed, and the tests that it ran."""

    name: str
    seconds: float
    failed: bool
    results: Sequence[Result]


def read_junit(path: Path) -> list[Result]:
    """Read the test cases of a file that pytest wrote; empty if it wrote none."""
    if not path.exists():
        return []
    return [_result(case) for case in ET.parse(path).iter("testcase")]  # noqa: S314 - pytest's own file


def _result(case: ET.Element) -> Result:
    """Read one `<testcase classname="tests.gateway.http.test_server" name="test_x[a]" time="0.01">`."""
    module = case.get("classname", "").split(".")
    folders = list(takewhile(lambda part: not part.startswith("test_"), module))
    file, classes = module[: len(folders) + 1], module[len(folders) + 1 :]
    depth = len(SPLIT) + 1 if tuple(folders[: len(SPLIT)]) == SPLIT else len(SPLIT)
    name = "::".join([f"{'/'.join(file)}.py", *classes, case.get("name", "")])
    skipped = case.find("skipped")
    outcome: Outcome = "passed"
    if case.find("failure") is not None or case.find("error") is not None:
        outcome = "failed"
    elif skipped is not None:
        outcome = "skipped"
    reason = "" if skipped is None else skipped.get("message", "")
    return Result("/".join(folders[:depth]), name, float(case.get("time", "0")), outcome, reason)


def summary(lanes: Sequence[Lane]) -> str:
    """Durations by folder, the slowest tests, wall times, skip reasons, failures, and the counts on the last line."""
    results = [result for lane in lanes for result in lane.results]
    return "\n".join(
        [
            *_table("seconds by folder", _folders(results)),
            *_table(f"slowest {SLOWEST} tests", _slowest(results)),
            *_table("wall time by lane", (f"{lane.seconds:8.1f} s  {lane.name}" for lane in lanes)),
            *_table("skipped", _skipped(results)),
            *_table("failed", _failed(lanes)),
            "",
            _counts(results),
        ]
    )


def _table(title: str, lines: Iterator[str]) -> Iterator[str]:
    listed = list(lines)
    if listed:
        yield from ("", f"{title}:", *listed)


def _folders(results: Sequence[Result]) -> Iterator[str]:
    folders: defaultdict[str, list[float]] = defaultdict(list)
    for result in results:
        folders[result.folder].append(result.seconds)
    for folder, seconds in sorted(folders.items(), key=lambda item: -sum(item[1])):
        yield f"{sum(seconds):8.1f} s  {len(seconds):5} tests  {folder}"


def _slowest(results: Sequence[Result]) -> Iterator[str]:
    for result in sorted(results, key=lambda result: -result.seconds)[:SLOWEST]:
        yield f"{result.seconds:8.1f} s  {result.name}"


def _skipped(results: Sequence[Result]) -> Iterator[str]:
    for reason, count in Counter(result.reason for result in results if result.outcome == "skipped").most_common():
        yield f"{count:5} tests  {reason}"


def _failed(lanes: Sequence[Lane]) -> Iterator[str]:
    for lane in lanes:
        failed = [result for result in lane.results if result.outcome == "failed"]
        yield from (f"  {result.name}" for result in failed)
        if lane.failed and not failed:
            yield f"  {lane.name} lane: pytest ended with an error, see its output"


def _counts(results: Sequence[Result]) -> str:
    outcomes = Counter(result.outcome for result in results)
    return ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
