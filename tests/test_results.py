"""The summary that ends a test run."""

from pathlib import Path

import pytest

from tests.results import Lane, read_junit, summary
from tests.run import main, report

LIGHT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="1" tests="5">
<testcase classname="tests.gateway.http.test_server" name="test_noise" time="2.5"/>
<testcase classname="tests.gateway.http.test_server" name="test_slow[a.b]" time="1.5"><failure message="no"/></testcase>
<testcase classname="tests.gateway.test_app" name="test_app" time="0.5"><error message="no"/></testcase>
<testcase classname="tests.config.test_load.TestTurns" name="runTest" time="0.25"/>
<testcase classname="tests.test_documents" name="test_links" time="0"><skipped message="no network"/></testcase>
</testsuite></testsuites>
"""


@pytest.fixture
def light(tmp_path: Path) -> Lane:
    """A lane of five tests with every outcome."""
    junit = tmp_path / "junit.xml"
    junit.write_text(LIGHT)
    return Lane("light", 3.0, failed=True, results=read_junit(junit))


def test_a_summary_names_folders_slow_tests_skips_and_failures(light: Lane) -> None:
    """Subfolders of tests/gateway have lines of their own; the last line sums up all lanes, with errors as failures."""
    empty = Lane("vllm", 1.0, failed=False, results=[])
    assert summary([light, empty]).splitlines()[1:] == [
        "seconds by folder:",
        "     4.0 s      2 tests  tests/gateway/http",
        "     0.5 s      1 tests  tests/gateway",
        "     0.2 s      1 tests  tests/config",
        "     0.0 s      1 tests  tests",
        "",
        "slowest 20 tests:",
        "     2.5 s  tests/gateway/http/test_server.py::test_noise",
        "     1.5 s  tests/gateway/http/test_server.py::test_slow[a.b]",
        "     0.5 s  tests/gateway/test_app.py::test_app",
        "     0.2 s  tests/config/test_load.py::TestTurns::runTest",
        "     0.0 s  tests/test_documents.py::test_links",
        "",
        "wall time by lane:",
        "     3.0 s  light",
        "     1.0 s  vllm",
        "",
        "skipped:",
        "    1 tests  no network",
        "",
        "failed:",
        "  tests/gateway/http/test_server.py::test_slow[a.b]",
        "  tests/gateway/test_app.py::test_app",
        "",
        "2 passed, 2 failed, 1 skipped",
    ]


def test_a_lane_that_ends_without_results_is_a_failure(tmp_path: Path) -> None:
    """A pytest that crashes writes no file: the summary says so, and the run fails."""
    crashed = Lane("model", 1.0, failed=True, results=read_junit(tmp_path / "none.xml"))
    assert "  model lane: pytest ended with an error, see its output" in summary([crashed]).splitlines()
    assert report([crashed]) == 1


def test_a_run_without_tests_is_a_failure() -> None:
    """Arguments that select no test, in any lane, must not look like success."""
    assert report([Lane("light", 1.0, failed=False, results=[])]) == 1


def test_a_failed_lane_is_a_failure(light: Lane) -> None:
    """One failed lane fails the run, whatever the others did."""
    passed = Lane("vllm", 1.0, failed=False, results=[each for each in light.results if each.outcome == "passed"])
    assert (report([light, passed]), report([passed])) == (1, 0)


def test_options_exclude_each_other() -> None:
    """`--check --light` is a usage error."""
    with pytest.raises(SystemExit, match="2"):
        main(["--check", "--light"])
