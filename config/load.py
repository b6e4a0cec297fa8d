"""Reads configuration files; reports all problems of a file at once, each as `file:line:column: path: problem; hint`.

The only module that reads configuration files and the process environment.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from config.errors import Problem, SettingsError
from config.rules import Location, Violation, closest, violations
from config.schema import Settings

_Kind = TypeVar("_Kind", bound=BaseModel)

ENVIRONMENT_REFERENCE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


def load_settings(path: Path, environment: Mapping[str, str] | None = None) -> Settings:
    """Read a configuration file; SettingsError lists all of its problems.

    `${env:NAME}` inside a string is replaced from `environment` (os.environ if None).
    """
    return load_file(path, Settings, violations, environment)


def load_file(
    path: Path,
    kind: type[_Kind],
    rules: Callable[[_Kind], Iterable[Violation]],
    environment: Mapping[str, str] | None = None,
) -> _Kind:
    """Read a YAML file, validate it against a model and its rules; SettingsError lists all problems."""
    document = _read(path, os.environ if environment is None else environment)
    try:
        settings = kind.model_validate(document.data)
    except ValidationError as error:
        document.problems += [document.problem(loc, what, hint) for loc, what, hint in _explained(error, kind)]
    else:
        document.problems += [document.problem(v.location, v.what, v.hint) for v in rules(settings)]
    if document.problems:
        raise SettingsError(sorted(document.problems, key=lambda p: (p.line, p.column)))
    return settings


def home_directory(environment: Mapping[str, str] | None = None) -> Path:
    """Return the directory for logs, state and cached variants: `$QUANTGATE_HOME`, by default `~/.cache/quantgate`."""
    home = (os.environ if environment is None else environment).get("QUANTGATE_HOME")
    return Path(home).expanduser().absolute() if home else Path.home() / ".cache" / "quantgate"


def process_environment() -> dict[str, str]:
    """Return a copy of the process environment, to be passed to a child process."""
    return dict(os.environ)


@dataclass
class _Document:
    """The data of a YAML file, and the line and column of each key and value."""

    file: Path
    environment: Mapping[str, str]
    data: object = None
    marks: dict[Location, tuple[int, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, location: Location, what: str, hint: str = "") -> Problem:
        """Create a problem with line and column; for a missing key, those of the closest enclosing table."""
        enclosing = location
        while enclosing and enclosing not in self.marks:
            enclosing = enclosing[:-1]
        line, column = self.marks.get(enclosing, (0, 0))
        return Problem(self.file, line, column, ".".join(map(str, location)), what, hint)

    def plain(self, node: yaml.Node | None, location: Location) -> object:
        """Convert a YAML node to dict, list and scalars, recording the position of each part."""
        if node is None:
            return {}
        self.marks.setdefault(location, (node.start_mark.line + 1, node.start_mark.column + 1))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, location)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, (*location, index)) for index, item in enumerate(node.value)]
        value = _scalar(node)
        return self._substituted(value, location) if isinstance(value, str) else value

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, object]:
        mapping: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = str(_scalar(key_node))
            here = (*location, key)
            self.marks[here] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if key in mapping:
                self.problems.append(self.problem(here, "is a duplicate key", "keep one"))
            mapping[key] = self.plain(value_node, here)
        return mapping

    def _substituted(self, text: str, location: Location) -> str:
        for name in ENVIRONMENT_REFERENCE.findall(text):
            if name not in self.environment:
                what = f"the environment variable {name} is not set"
                self.problems.append(self.problem(location, what, f"export {name}=..."))
        return ENVIRONMENT_REFERENCE.sub(lambda match: self.environment.get(match[1], ""), text)


def _read(path: Path, environment: Mapping[str, str]) -> _Document:
    document = _Document(path, environment)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise SettingsError([Problem(path, 0, 0, "", f"can't be read: {reason}")]) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        raise SettingsError([Problem(path, line, column, "", f"is not YAML: {error.problem}")]) from error
    document.data = document.plain(root, ())
    return document


def _scalar(node: yaml.Node) -> object:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _explained(error: ValidationError, root: type[BaseModel]) -> list[tuple[Location, str, str]]:
    return [_explain(item["type"], item["loc"], item["msg"], item.get("input"), root) for item in error.errors()]


def _explain(
    kind: str, location: Location, message: str, given: object, root: type[BaseModel]
) -> tuple[Location, str, str]:
    if kind == "extra_forbidden":
        return location, "unknown key", closest(str(location[-1]), known_keys(location[:-1], root))
    if kind == "missing":
        return location, "is missing", ""
    if location and location[-1] == "[key]":
        return location[:-1], f"{given!r} is not a valid name", "use letters, digits and . _ : / -"
    if kind == "value_error":  # a validator of this project, whose message names the value
        return location, message.removeprefix("Value error, "), ""
    return location, message + ("" if isinstance(given, dict | list) else f", got {given!r}"), ""


def known_keys(location: Location, root: type[BaseModel] = Settings) -> list[str]:
    """Return the keys that the schema allows at a location; empty for a table with user-defined names."""
    kind: Any = root
    for part in location:
        kind = _inside(kind, part)
    model = _model(kind)
    return list(model.model_fields) if model else []


def _inside(kind: Any, part: str | int) -> Any:
    model = _model(kind)
    if model is not None:
        field_info = model.model_fields.get(str(part))
        return field_info.annotation if field_info else None
    arguments = get_args(kind)
    return arguments[1 if get_origin(kind) is dict else 0] if arguments else None


def _model(kind: Any) -> type[BaseModel] | None:
    if get_origin(kind) is Annotated or get_origin(kind) in (Union, UnionType):
        return next(filter(None, map(_model, get_args(kind))), None)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
