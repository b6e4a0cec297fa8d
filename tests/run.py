"""Run what CI runs: formatting, lint, types, import contracts, then the tests in three lanes.

`python -m tests.run [--check | --light | --coverage] [PYTEST ARGUMENTS]`

* without an option: the checks; if they pass, all lanes. A lane runs even if an earlier one failed.
* `--check`: the checks only.
* `--light`: the light lane only.
* `--coverage`: the light lane under branch coverage, which takes twice the CPU time; fails below `fail_under` of
  pyproject.toml.

The lanes:

* light: every test that is not marked `real_vllm` or `real_model`, in three processes: a test waits most of its time,
  for fakes and for deadlines.
* model: `real_model`, in one process: torch on tiny models, which takes one core at a time.
* vllm: `real_vllm`, in one process: the tests share one demo and its replicas, and engines take all cores. It begins
  with the quantization of the demo's model, which takes one core for minutes: the model lane runs beside that, and its
  output is printed when both have ended.

The last line of a run with tests is `N passed, N failed, N skipped`, summed over the lanes.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from tests.results import Lane, read_junit, summary

CHECKS = (
    ("ruff", "format", "--check", "--quiet", "."),
    ("ruff", "check", "--quiet", "."),
    ("mypy",),
    ("lint-imports", "--no-logo"),
)
LIGHT = ("-m", "not real_vllm and not real_model")
MODEL = ("-m", "real_model")
VLLM = ("-m", "real_vllm")
# A file stays in one process: its module fixtures are built once.
PARALLEL = ("-n", "3", "--dist", "loadfile", "--no-loadscope-reorder")
NO_TESTS_COLLECTED = 5


def main(arguments: Sequence[str]) -> int:
    """Run what the option asks for; non-zero if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.run", allow_abbrev=False)
    options = parser.add_mutually_exclusive_group()
    options.add_argument("--check", action="store_true", help="checks only: formatting, lint, types, imports")
    options.add_argument("--light", action="store_true", help="light lane only: no real vLLM, no real model")
    options.add_argument("--coverage", action="store_true", help="light lane under branch coverage")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.coverage:
        return report([light_lane(rest, coverage=True)]) or coverage_report()
    if chosen.light:
        return report([light_lane(rest)])
    failures = [run(*command) for command in CHECKS]
    if any(failures) or chosen.check:
        return int(any(failures))
    light = light_lane(rest)
    with ThreadPoolExecutor(1) as beside, tempfile.TemporaryFile() as output:
        model = beside.submit(lane, "model", "pytest", *rest, *MODEL, output=output)
        vllm = lane("vllm", "pytest", *rest, *VLLM)
        lanes = [light, model.result(), vllm]
        output.seek(0)
        sys.stdout.write(output.read().decode(errors="replace"))
    return report(lanes)


def light_lane(arguments: Sequence[str], *, coverage: bool = False) -> Lane:
    """Run the tests that start neither vLLM nor torch on a model."""
    pytest = ("coverage", "run", "-m", "pytest") if coverage else ("pytest",)
    return lane("light", *pytest, *PARALLEL, *arguments, *LIGHT)


def lane(name: str, *command: str, output: IO[bytes] | None = None) -> Lane:
    """Run one pytest command and read its results; None for `output` is the terminal."""
    with tempfile.TemporaryDirectory(prefix="junit-") as folder:
        junit = Path(folder, "junit.xml")
        started = time.monotonic()
        exit_code = run(*command, f"--junitxml={junit}", output=output)
        seconds = time.monotonic() - started
        # The arguments may select tests of one lane only.
        failed = exit_code not in (0, NO_TESTS_COLLECTED)
        return Lane(name, seconds, failed, read_junit(junit))


def report(lanes: Sequence[Lane]) -> int:
    """Print the durations and the counts; 1 if a lane failed or no test ran."""
    print(summary(lanes), flush=True)
    return int(any(each.failed for each in lanes) or not any(each.results for each in lanes))


def coverage_report() -> int:
    """Join the data files of all processes and print the lines that no test ran; non-zero below `fail_under`."""
    return run("coverage", "combine", "--quiet") or run("coverage", "report")


def run(program: str, *arguments: str, output: IO[bytes] | None = None) -> int:
    """Run a program of this environment and return its exit code."""
    print(f"+ {program} {' '.join(arguments)}", file=sys.stderr, flush=True)
    # Threads that spin while they wait for each other slow down whatever else runs on the same few cores.
    environ = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    errors = None if output is None else subprocess.STDOUT
    return subprocess.run(command, env=environ, stdout=output, stderr=errors, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
