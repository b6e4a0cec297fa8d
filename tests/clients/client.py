"""What a client is: a program in `programs/`, whose first lines say what it needs and what it does."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Installer = Literal["pip", "npm", "tests"]
PROGRAMS = Path(__file__).with_name("programs")
_HEADER = re.compile(r"(?:#|//) (pip|npm|tests|ci|title|runs): (.+)")


@dataclass(frozen=True, slots=True)
class Client:
    """One client; `packages` are installed by `installer`, and the first one is the client itself.

    Those of `tests` are in the tests' own environment, or the client can't be run. `in_ci`: it installs in seconds.
    """

    name: str
    program: Path
    title: str
    runs: str
    installer: Installer
    packages: tuple[str, ...]
    in_ci: bool = False

    @property
    def package(self) -> str:
        """The name of the package whose version is shown."""
        name, _, _ = self.packages[0].partition("[")
        return re.split(r"[=<>]|(?<!^)@", name)[0]


def read_clients(folder: Path = PROGRAMS) -> dict[str, Client]:
    """Read every program of a folder, by name."""
    files = sorted(path for path in folder.iterdir() if path.suffix in {".py", ".mjs"} and path.stem != "__init__")
    return {client.name: client for client in map(read_client, files)}


def read_client(path: Path) -> Client:
    """Read the head of one program; ValueError if something is missing."""
    head: Mapping[str, str] = dict(_HEADER.findall(path.read_text(encoding="utf-8")))
    installer: Installer = "npm" if "npm" in head else "tests" if "tests" in head else "pip"
    if missing := {installer, "title", "runs"} - head.keys():
        raise ValueError(f"{path}: no {', '.join(sorted(missing))} in its first lines")
    packages = tuple(head[installer].split())
    name = path.stem.replace("_", "-")
    return Client(name, path, head["title"], head["runs"], installer, packages, head.get("ci") == "yes")
