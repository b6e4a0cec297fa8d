"""Everything that CI runs: formatting, lint, types, import contracts, then the tests with branch coverage.

`python -m tests.run [--check] [PYTEST ARGUMENTS]`; `--check` stops before the tests.
"""

import subprocess
import sys

CHECKS = (
    ("ruff", "format", "--check", "--quiet", "."),
    ("ruff", "check", "--quiet", "."),
    ("mypy",),
    ("importlinter.cli", "lint"),
)


def main(arguments: list[str]) -> int:
    """Run all checks, then the tests; non-zero if any failed."""
    for words in CHECKS:
        module = [sys.executable, "-m", *words] if words[0] != "importlinter.cli" else [_script("lint-imports")]
        print(f"+ {' '.join(words)}", file=sys.stderr, flush=True)
        if subprocess.run(module, check=False).returncode:
            return 1
    if "--check" in arguments:
        return 0
    tests = subprocess.run(
        [sys.executable, "-m", "coverage", "run", "-m", "pytest", *arguments], check=False
    ).returncode
    for step in (["combine", "--quiet"], ["report", "--skip-covered"]):
        subprocess.run([sys.executable, "-m", "coverage", *step], check=False)
    return tests


def _script(name: str) -> str:
    return sys.executable.removesuffix("python") + name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
