"""Where a client is installed: a folder of its own, never the environment of the tests."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from config.load import home_directory
from tests.clients.client import Client
from tests.fakes.running import ROOT

INSTALL_SECONDS = 900
RUN_SECONDS = 240


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run: the version of the client, and None or the last words of what failed."""

    version: str
    failure: str | None


class ClientError(Exception):
    """A client can't be installed here."""


@dataclass(frozen=True, slots=True)
class Environment:
    """The folder of one client, below `$QUANTGATE_HOME/clients`."""

    client: Client
    folder: Path

    @classmethod
    def of(cls, client: Client) -> "Environment":
        """The environment of a client on this machine, installed or not."""
        return cls(client, home_directory() / "clients" / client.name)

    @property
    def installed(self) -> bool:
        """Whether these packages were installed there."""
        stamp = self.folder / "packages"
        return stamp.exists() and stamp.read_text() == " ".join(self.client.packages)

    def install(self) -> None:
        """Install the packages, unless they are there; ClientError with the last words of the installer."""
        if self.installed:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for command in self._commands():
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
            )
            if done.returncode:
                raise ClientError(f"{self.client.name} can't be installed: {last_words(done.stderr)}")
        (self.folder / "packages").write_text(" ".join(self.client.packages))

    def run(self, url: str, model: str) -> Outcome:
        """Run the program against a gateway, with nothing of our own environment but the path."""
        program = self.client.program
        if program.suffix == ".mjs":  # finds packages beside itself
            program = Path(shutil.copy(program, self.folder))
        with tempfile.TemporaryDirectory(prefix=f"client-{self.client.name}-") as home:
            variables = {"HOME": home, "PATH": os.environ["PATH"], "QUANTGATE_URL": url, "QUANTGATE_MODEL": model}
            variables |= {"CLIENT_FOLDER": str(self.folder), "PYTHONWARNINGS": "ignore"}
            command = [*self._interpreter(), str(program)]
            try:
                done = subprocess.run(
                    command,
                    cwd=home,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=RUN_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return Outcome(self.version(), f"not done after {RUN_SECONDS} s")
        return Outcome(self.version(), last_words(done.stderr or done.stdout) if done.returncode else None)

    def version(self) -> str:
        """The installed version of the client's first package."""
        if self.client.installer == "npm":
            described = self.folder / "node_modules" / self.client.package / "package.json"
            return str(json.loads(described.read_text(encoding="utf-8"))["version"])
        program = f"from importlib.metadata import version; print(version({self.client.package!r}))"
        return subprocess.run(
            [self._python(), "-c", program], capture_output=True, text=True, check=True
        ).stdout.strip()

    def _commands(self) -> list[list[str]]:
        if self.client.installer == "tests":
            return [[sys.executable, "-c", f"from importlib.metadata import version; version({self.client.package!r})"]]
        if self.client.installer == "npm":
            quiet = ("--no-audit", "--no-fund", "--loglevel=error")
            return [["npm", "install", *quiet, "--prefix", str(self.folder), *self.client.packages]]
        uv = [sys.executable, "-m", "uv"]
        return [
            [*uv, "venv", "--quiet", "--python", sys.executable, str(self.folder / "venv")],
            [*uv, "pip", "install", "--quiet", "--python", self._python(), *_options(), *self.client.packages],
        ]

    def _interpreter(self) -> list[str]:
        if self.client.program.suffix == ".mjs":
            return ["node"]
        # -P: a program may have the name of the package that it imports.
        return [self._python(), "-P"]

    def _python(self) -> str:
        if self.client.installer != "pip":
            return sys.executable
        return str(self.folder / "venv" / "bin" / "python")


def _options() -> list[str]:
    """The indexes of pip's configuration, as options of uv."""
    installer = runpy.run_path(str(ROOT / "deploy" / "install.py"))
    return list(map(str, installer["pip_options"](sys.executable)))


def last_words(text: str) -> str:
    """The last line that says something, in at most 200 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"
