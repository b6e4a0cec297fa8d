"""What can be wrong with a file of ours.

ConfigError
├── SettingsError     the configuration file: every problem in it, each with its line
├── ManifestError     a variant's manifest.json: unreadable, of another format, or at odds with the files beside it
└── CapacityError     a variant's capacity.json: unreadable, of another format, or in a place that can't be written
"""

from dataclasses import dataclass
from pathlib import Path


class ConfigError(Exception):
    """A file does not say what it must; the message names the file and what to do."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong at one place of a file; `line` and `column` count from 1, 0 means unknown."""

    file: Path
    line: int
    column: int
    path: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}" if self.line else str(self.file)
        subject = f"{self.path}: " if self.path else ""
        hint = f"; {self.hint}" if self.hint else ""
        return f"{where}: {subject}{self.what}{hint}"


class SettingsError(ConfigError):
    """A configuration file has problems; `str()` lists them all, one a line."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


class ManifestError(ConfigError):
    """A variant directory's manifest can't be used."""


class CapacityError(ConfigError):
    """A file of measured speeds can't be used, or can't be written."""
