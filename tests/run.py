"""Everything that CI runs: formatting, lint, types, import contracts, then the tests with branch coverage.

`python -m tests.run [--check] [PYTEST ARGUMENTS]`; `--check` stops before the tests.
"""

import os
import subprocess
import sys
from pathlib import Path

CHECKS = (
    ("ruff", "format", "--check", "--quiet", "."),
    ("ruff", "check", "--quiet", "."),
    ("mypy",),
    ("lint-imports", "--no-logo"),
)


def main(arguments: list[str]) -> int:
    """Run all checks, then the tests; non-zero if any failed."""
    if any(run(*words) for words in CHECKS):
        return 1
    if "--check" in arguments:
        return 0
    failed = run("coverage", "run", "-m", "pytest", *arguments)
    run("coverage", "combine", "--quiet")
    run("coverage", "report", "--skip-covered")
    return failed


def run(program: str, *arguments: str) -> int:
    """Run a program of this environment and return its exit code."""
    print(f"+ {program} {' '.join(arguments)}", file=sys.stderr, flush=True)
    # Threads that spin while they wait for each other slow down whatever else runs on the same few cores.
    environ = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    return subprocess.run([Path(sys.executable).with_name(program), *arguments], env=environ, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
