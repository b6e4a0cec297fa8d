"""The command line as a process, run from the checkout."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_CODE = "import sys, {module} as cli; sys.exit(getattr(cli, sys.argv[1])(sys.argv[2:]))"


def command(entry: str, *arguments: object) -> list[str]:
    """The argv that calls `<entry>` of `quantize.cli` or `quantize.variants_cli`."""
    module = "quantize.variants_cli" if entry == "variants_main" else "quantize.cli"
    return [sys.executable, "-c", _CODE.format(module=module), entry, *map(str, arguments)]


def run(entry: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run an entry of the command line to its end."""
    return subprocess.run(
        command(entry, *arguments), cwd=ROOT, capture_output=True, text=True, check=False, env=environ(), timeout=400
    )


def environ() -> dict[str, str]:
    """The test's own environment, with the checkout importable."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}
