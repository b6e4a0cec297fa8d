"""Reads a YAML file into plain data, with the line and column of each key and value.

Scalars are read by YAML 1.2's core schema: `yes`, `on` and dates are text, and the schema of the file decides what they
mean. Nothing that a YAML parser returns raises anything but SettingsError.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import yaml

from config.errors import Problem, SettingsError
from config.references import other_references, replace_references
from config.rules import Location

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
PASSWORD_IN_URL = re.compile(r"(://[^\s:/@]*:)[^\s@]+(@)")

_WIDE_ESCAPE = re.compile(r"\\U([0-9A-Fa-f]{8})")

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_INTEGER = re.compile(r"[-+]?[0-9]{1,19}")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_STANDARD = "tag:yaml.org,2002:"
_TAGS = frozenset(_STANDARD + name for name in ("str", "int", "float", "bool", "null", "map", "seq"))

MAX_DEPTH = 32
MAX_VALUES = 200_000  # aliases count each time they are used
MAX_SHOWN = 80


@dataclass(slots=True)
class Document:
    """The data of a YAML file: dict, list, str, int, float and None; booleans are text, as written.

    `written` has the text of each scalar as it is in the file, before references are replaced.
    """

    file: Path
    data: object = None
    marks: dict[Location, tuple[int, int]] = field(default_factory=dict)
    written: dict[Location, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, location: Location, what: str, hint: str = "") -> Problem:
        """Create a problem with line and column; for a missing key, those of the closest enclosing table."""
        enclosing = location
        while enclosing and enclosing not in self.marks:
            enclosing = enclosing[:-1]
        line, column = self.marks.get(enclosing, (0, 0))
        return Problem(self.file, line, column, dotted(location), what, hint)

    def shown(self, location: Location, value: object) -> str:
        """Describe a value in YAML's words, as it is written in the file; passwords in URLs are masked."""
        if isinstance(value, dict):
            return "a mapping"
        if isinstance(value, list):
            return "a list"
        text = self.written.get(location, "" if value is None else str(value))
        if value is None:
            return "nothing"
        text = printable(PASSWORD_IN_URL.sub(r"\1***\2", text))
        return f"'{text}'" if isinstance(value, str) else text


def dotted(location: Location) -> str:
    """Return the path of an option, for a message."""
    return ".".join(map(printable, location))


def printable(part: object) -> str:
    """Return text for a message: short, on one line, without control characters."""
    text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(part))
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def read_document(path: Path, environment: Mapping[str, str]) -> Document:
    """Read a YAML file; SettingsError if it can't be read, isn't YAML, or is empty.

    References inside a value (config/references.py) are replaced. Problems of single values are in `Document.problems`.
    """
    text = _text(path)
    root = _compose(path, text)
    if root is None or (_is_plain(root) and root.value in _NULL):
        hint = "restore its content; {} stands for a file that is empty on purpose"
        raise SettingsError([Problem(path, 1, 1, "", "is empty", hint)])
    document = Document(path)
    document.data = _Reader(document, environment).value(root, ())
    document.problems = list(dict.fromkeys(document.problems))
    return document


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        hint = "check the path" if isinstance(error, FileNotFoundError) else "check its permissions"
        raise SettingsError([Problem(path, 0, 0, "", f"can't be read: {error.strerror}", hint)]) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SettingsError([Problem(path, line, 1, "", "is not UTF-8 text", "save it as UTF-8")]) from None
    except ValueError:  # a null byte in the path
        raise SettingsError([Problem(path, 0, 0, "", "is not a valid path", "check the path")]) from None


def _compose(path: Path, text: str) -> yaml.Node | None:
    line, column, hint = 0, 0, "remove it"
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if mark is not None:
            line, column = mark.line + 1, mark.column + 1
        what, hint = f"is not YAML: {error.problem or error.context}", _remedy(error)
    except yaml.reader.ReaderError as error:
        line, column = _line_and_column(text, error.position)
        what = f"is not YAML: it contains the control character #x{error.character:04x}"
    except RecursionError:
        what, hint = "is nested too deeply", f"use at most {MAX_DEPTH} levels"
    except (yaml.YAMLError, ValueError, OverflowError):
        wide = next((each for each in _WIDE_ESCAPE.finditer(text) if int(each[1], 16) > sys.maxunicode), None)
        line, column = _line_and_column(text, wide.start()) if wide else (0, 0)
        what, hint = (
            "is not YAML: it has an escape that is not a character",
            "check the \\U escapes in its quoted texts",
        )
    raise SettingsError([Problem(path, line, column, "", what, hint)]) from None


def _line_and_column(text: str, position: int) -> tuple[int, int]:
    before = text[:position]
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def _remedy(error: yaml.MarkedYAMLError) -> str:
    """Return what to do about an error of the YAML parser."""
    problem, context = str(error.problem), str(error.context)
    opened = f" opened in line {error.context_mark.line + 1}" if error.context_mark else ""
    remedies = (
        ("'\\t'", "indent with spaces, not with tabs"),
        ("mapping values are not allowed", "put a value that contains ': ' in quotes, or correct the indentation"),
        ("another document", "remove the line '---' and what follows it: the file is one document"),
        ("',' or", f"close the bracket{opened}"),
        ("undefined alias", "define the anchor with & before it is used"),
        ("duplicate anchor", "give each anchor its own name"),
        ("could not find expected ':'", "write 'name: value', and close all quotes before this line"),
        ("<block end>", "align this line with those of its table"),
        ("cannot start any token", "put the value in quotes"),
        ("undefined tag handle", "remove the tag"),
    )
    if "quoted scalar" in context:
        return f"close the quote{opened}; write a backslash twice inside double quotes"
    return next((remedy for part, remedy in remedies if part in problem), "check quotes, brackets and indentation")


def _is_plain(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and not node.style


@dataclass(slots=True)
class _Reader:
    """Converts the nodes of one document; `_open` are those around the current one."""

    document: Document
    environment: Mapping[str, str]
    _open: list[yaml.Node] = field(default_factory=list)
    _values: int = 0

    def value(self, node: yaml.Node, location: Location) -> object:
        """Convert a node to dict, list or scalar, and record the position of each part."""
        self.document.marks.setdefault(location, _place(node))
        self._values += 1
        if self._values > MAX_VALUES:
            self._stop(node, location, f"has more than {MAX_VALUES} values", "use fewer aliases")
        if node.tag not in _TAGS:
            tag = node.tag.replace(_STANDARD, "!!")
            self._report(location, f"the tag {printable(tag)} is not supported", "remove it")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, location)
        if node in self._open:
            self._stop(node, location, "contains itself through an alias", "remove the alias")
        if len(self._open) == MAX_DEPTH:
            self._stop(node, location, "is nested too deeply", f"use at most {MAX_DEPTH} levels")
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, location)
            return [self.value(item, (*location, index)) for index, item in enumerate(node.value)]
        finally:
            self._open.pop()

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, object]:
        merged: dict[str, object] = {}
        for source in self._merge_sources(node, location):
            merged = {**self._included(source, location), **merged}
        explicit: dict[str, object] = {}
        for key_node, value_node in node.value:
            if _is_merge(key_node):
                continue
            key = self._key(key_node, location)
            if key is None:
                continue
            here = (*location, key)
            if key in explicit:
                # The first one counts, so that references to it cause no further problems.
                self._report_at(key_node, here, "is a duplicate key", "keep one")
                continue
            self.document.marks[here] = _place(key_node)
            explicit[key] = self.value(value_node, here)
        return {**merged, **explicit}

    def _merge_sources(self, node: yaml.MappingNode, location: Location) -> Iterator[yaml.MappingNode]:
        """Yield the mappings that `<<` includes; of several with one key, the first counts."""
        for key_node, value_node in node.value:
            if not _is_merge(key_node):
                continue
            for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                if isinstance(source, yaml.MappingNode):
                    yield source
                else:
                    hint = "write <<: *NAME, with &NAME at the mapping"
                    self._report_at(key_node, (*location, "<<"), "must name a mapping", hint)

    def _included(self, source: yaml.MappingNode, location: Location) -> dict[str, object]:
        included = self.value(source, location)
        return included if isinstance(included, dict) else {}

    def _key(self, node: yaml.Node, location: Location) -> str | None:
        if isinstance(node, yaml.ScalarNode) and node.tag in _TAGS and node.value:
            self._check_characters(node.value, (*location, node.value))
            return str(node.value)
        self._report_at(node, location, "a key is not a name", "write 'name: value'")
        return None

    def _scalar(self, node: yaml.ScalarNode, location: Location) -> object:
        text = str(node.value)
        self.document.written[location] = text
        if _is_plain(node):
            if text in _NULL:
                return None
            if _INTEGER.fullmatch(text):
                return int(text)
            if _FLOAT.fullmatch(text):
                return float(text)
            if _INFINITY.fullmatch(text):
                return float(text.replace(".", ""))
        replaced = self._substituted(text, location)
        self._check_characters(replaced, location)
        return replaced

    def _substituted(self, text: str, location: Location) -> str:
        for reference in other_references(text):
            name = reference[2:].rstrip("}")
            hint = f"write ${{env:{name if name.isidentifier() else 'NAME'}}} for an environment variable"
            self._report(location, f"{printable(reference)} is not replaced", hint)
        return replace_references(text, self.environment, lambda what, hint: self._report(location, what, hint))

    def _check_characters(self, text: str, location: Location) -> None:
        if match := _CONTROL.search(text):
            self._report(location, f"contains {printable(match[0])}, which is not text", "remove it")

    def _report(self, location: Location, what: str, hint: str) -> None:
        self.document.problems.append(self.document.problem(location, what, hint))

    def _report_at(self, node: yaml.Node, location: Location, what: str, hint: str) -> None:
        self.document.problems.append(self._at(node, location, what, hint))

    def _stop(self, node: yaml.Node, location: Location, what: str, hint: str) -> NoReturn:
        raise SettingsError([self._at(node, location[:4], what, hint)])

    def _at(self, node: yaml.Node, location: Location, what: str, hint: str) -> Problem:
        line, column = _place(node)
        return Problem(self.document.file, line, column, dotted(location), what, hint)


def _place(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _is_merge(node: yaml.Node) -> bool:
    return _is_plain(node) and node.value == "<<"
