"""Errors of configuration files and variant directories.

ConfigError
├── SettingsError     the configuration file and the files it names: all of their problems, each with its line
├── OptionError       one option of a valid file can't be used: a file that it names is missing or invalid
├── ReloadRefused     a valid configuration that would leave nothing of what answers now
├── ManifestError     a model directory or its manifest.json: missing, unreadable or invalid
└── CapacityError     a capacity.json: unreadable, invalid or not writable
"""

from dataclasses import dataclass
from pathlib import Path


class ConfigError(Exception):
    """A file is missing or invalid; the message names the file, the problem and the fix."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem in a file.

    `line` and `column` count from 1; 0 means unknown. `path` is the dotted path of the option, `what` the problem and
    `hint` the fix.
    """

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
        return " ".join(f"{where}: {subject}{self.what}{hint}".splitlines())  # a name may have a line break


class SettingsError(ConfigError):
    """A configuration file is invalid; `str()` lists all problems, one per line."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


class OptionError(ConfigError):
    """An option of a valid file can't be used; `location` is its path in the file."""

    def __init__(self, location: tuple[str | int, ...], what: str, hint: str) -> None:
        self.location, self.what, self.hint = location, what, hint
        super().__init__(f"{'.'.join(map(str, location))}: {what}; {hint}")


class ReloadRefused(ConfigError):
    """A reload would leave no alias, variant or key that works now; it is applied if it is requested again."""


class ManifestError(ConfigError):
    """A model directory or its manifest is missing, unreadable or invalid."""


class CapacityError(ConfigError):
    """A capacity.json is unreadable, invalid or not writable."""
