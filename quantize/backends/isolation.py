"""An environment of its own for a program whose pins are too old for ours: made once, under the digest of its pins."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from config.load import home_directory
from quantize.errors import RecipeError, WorkerError
from quantize.variants.store import sweep

_SHOWN_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Pins:
    """A program, the file that pins it and all it needs, and the versions of Python that the pins are for."""

    program: str
    file: Path
    pythons: tuple[str, ...]


def isolated_python(pins: Pins, environ: Mapping[str, str], log_file: Path) -> Path:
    """Give the interpreter of the environment with these pins; the first call makes it (minutes, gigabytes).

    What the installer says goes to `log_file`. RecipeError where no fitting Python is at hand, WorkerError where the
    pins can't be installed; a half-made environment is never used.
    """
    home = environment_of(pins, home_directory(environ))
    python = home / "bin" / "python"
    if not python.exists():  # nor does it where the Python that it was made from is gone
        _make(pins, home, environ, log_file)
    return python


def environment_of(pins: Pins, home: Path) -> Path:
    """Name the environment's directory: other pins, another directory."""
    return home / "environments" / hashlib.sha256(pins.file.read_bytes()).hexdigest()[:16]


def making(pins: Pins, directory: Path, uv: str | None, python: str | None) -> list[list[str]]:
    """Choose the commands that make an environment: uv's, which finds a Python itself, or those of `python`'s own pip.

    Wheels only: nothing of a package runs or compiles while it is installed.
    """
    wanted = ["-r", str(pins.file), "--only-binary", ":all:"]
    inside = str(directory / "bin" / "python")
    if uv:
        chosen = python or pins.pythons[0]
        return [
            [uv, "venv", "--no-project", "--python", chosen, str(directory)],
            [uv, "pip", "install", "--python", inside, *wanted],
        ]
    if python:
        return [
            [python, "-I", "-m", "venv", str(directory)],
            [inside, "-I", "-m", "pip", "install", "--no-input", *wanted],
        ]
    raise RecipeError(
        f"{pins.program} runs on Python {' or '.join(pins.pythons)} only, and none is on the PATH; "
        f"install python{pins.pythons[0]} or uv, or use --backend gptqmodel",
    )


def fitting_python(pythons: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """Find an interpreter of one of these versions: this one, or the first on the PATH."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" in pythons:
        return sys.executable
    found = (shutil.which(f"python{version}", path=environ.get("PATH")) for version in pythons)
    return next((path for path in found if path), None)


def _make(pins: Pins, home: Path, environ: Mapping[str, str], log_file: Path) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    sweep(home)
    staged = home.with_name(f".{home.name}.{os.getpid()}.partial")
    uv, python = shutil.which("uv", path=environ.get("PATH")), fitting_python(pins.pythons, environ)
    try:
        for command in making(pins, staged, uv, python):
            _run(command, environ, log_file, pins.program)
        _publish(staged, home)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _run(command: list[str], environ: Mapping[str, str], log_file: Path, program: str) -> None:
    with log_file.open("ab") as log:
        # Not ours to see: the project's own packages must not hide in the environment.
        kept = {name: value for name, value in environ.items() if name != "PYTHONPATH"}
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=kept, check=False
        ).returncode
    if code:
        output = [line.strip() for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
        raise WorkerError(
            f"{program}: its environment can't be made: {output[-1][:_SHOWN_CHARACTERS] if output else command[0]}; "
            "it needs a package index or --backend gptqmodel",
        )


def _publish(staged: Path, home: Path) -> None:
    if (home / "bin" / "python").exists():  # another process was faster
        return
    shutil.rmtree(home, ignore_errors=True)
    staged.rename(home)
