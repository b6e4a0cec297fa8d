"""Check what quantgate relies on in vLLM: `python -m tests.contract.vllm [--wheel vllm==0.33.0 | --wheel FILE.whl]`.

Without --wheel, the installed vLLM is read. Nothing is imported or installed, so a version for other hardware can be
checked, too. Exit code 1 if something is missing.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.contract.reliances import missing, reliances
from tests.contract.sources import NoSources, Sources, installed_sources, wheel_sources


def main(arguments: list[str]) -> int:
    """Print what is missing."""
    parser = argparse.ArgumentParser(prog="python -m tests.contract.vllm", description=__doc__)
    parser.add_argument("--wheel", help="a wheel file, or a requirement that pip can download, as vllm==0.33.0")
    options = parser.parse_args(arguments)
    try:
        with _sources(options.wheel) as sources:
            absent, count = missing(sources), sum(1 for _ in reliances())
            for reliance in absent:
                print(f"missing in vLLM {sources.version}: {reliance}")
            print(f"vLLM {sources.version}: {count - len(absent)} of {count} things that quantgate relies on are there")
            return int(bool(absent))
    except NoSources as error:
        print(error, file=sys.stderr)
        return 2


@contextmanager
def _sources(wheel: str | None) -> Iterator[Sources]:
    if wheel is None:
        yield installed_sources()
    elif wheel.endswith(".whl"):
        yield wheel_sources(Path(wheel))
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield wheel_sources(_downloaded(wheel, Path(folder)))


def _downloaded(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise NoSources(f"{requirement} can't be downloaded: {done.stderr.strip()[-300:]}")
    return next(folder.glob("*.whl"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
