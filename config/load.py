"""Reads configuration files; reports all problems of a file at once, each as `file:line:column: path: problem; hint`.

The only module that reads configuration files and the process environment.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from config.document import Document, read_document
from config.errors import Problem, SettingsError
from config.explain import Explainer
from config.rules import Location, Violation, violations
from config.schema import Settings

_Kind = TypeVar("_Kind", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class LoadedFile(Generic[_Kind]):
    """A valid file: its settings, and where each of them is written."""

    settings: _Kind
    document: Document

    def problem(self, location: Location, what: str, hint: str = "") -> Problem:
        """Create a problem at an option of the file."""
        return self.document.problem(location, what, hint)


def load_settings(path: Path, environment: Mapping[str, str] | None = None) -> Settings:
    """Read a configuration file; SettingsError lists all of its problems.

    References inside a string (config/references.py) are replaced from `environment` (os.environ if None).
    """
    return load_settings_file(path, environment).settings


def load_settings_file(path: Path, environment: Mapping[str, str] | None = None) -> LoadedFile[Settings]:
    """Read a configuration file, with the places of its options; SettingsError lists all of its problems."""
    return _load(path, Settings, violations, environment)


def load_file(
    path: Path,
    kind: type[_Kind],
    rules: Callable[[_Kind], Iterable[Violation]],
    environment: Mapping[str, str] | None = None,
) -> _Kind:
    """Read a YAML file, validate it against a model and its rules; SettingsError lists all problems."""
    return _load(path, kind, rules, environment).settings


def _load(
    path: Path,
    kind: type[_Kind],
    rules: Callable[[_Kind], Iterable[Violation]],
    environment: Mapping[str, str] | None,
) -> LoadedFile[_Kind]:
    document = read_document(path, os.environ if environment is None else environment)
    problems = list(document.problems)
    try:
        settings = kind.model_validate(document.data)
    except ValidationError as error:
        found = [*Explainer(kind, document.shown).violations(error)]
    else:
        found = [*rules(settings)]
    # A value that was not read, such as one with an unknown tag, is reported once.
    unread = {problem.path for problem in problems}
    placed = [document.problem(violation.location, violation.what, violation.hint) for violation in found]
    problems += [problem for problem in placed if problem.path not in unread]
    if problems:
        raise SettingsError(sorted(problems, key=lambda p: (p.line, p.column)))
    return LoadedFile(settings, document)


def home_directory(environment: Mapping[str, str] | None = None) -> Path:
    """Return the directory for logs, state and cached variants: `$QUANTGATE_HOME`, by default `~/.cache/quantgate`."""
    home = (os.environ if environment is None else environment).get("QUANTGATE_HOME")
    return Path(home).expanduser().absolute() if home else Path.home() / ".cache" / "quantgate"


def process_environment() -> dict[str, str]:
    """Return a copy of the process environment, to be passed to a child process."""
    return dict(os.environ)


def default_environment(defaults: Mapping[str, str]) -> None:
    """Set variables of this process that are not set: for a library that reads its options while it is imported."""
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
