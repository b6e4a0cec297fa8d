"""Explains the validation errors of pydantic in the words of a YAML file: what is wrong, and what to write. Pure."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import ErrorDetails

from config.document import printable
from config.field_types import PATTERNS
from config.rules import Location, Violation, closest
from config.schema import Settings

# Describes a value as it is written in the file.
Shown = Callable[[Location, object], str]

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_WITH_UNIT = re.compile(r"[\d.]+\s*(?:ms|s|sec|seconds?|m|min|minutes?|h|hours?|d)")
_LARGEST_SHARE = 1.0
_SEE = "config/example.yaml describes it"
_BOUNDS = {
    "greater_than_equal": ("ge", "must be at least", "a larger"),
    "greater_than": ("gt", "must be greater than", "a larger"),
    "less_than_equal": ("le", "must be at most", "a smaller"),
    "less_than": ("lt", "must be less than", "a smaller"),
}
_MAPPINGS = ("model_type", "dict_type", "mapping_type", "model_attributes_type")
_LISTS = ("tuple_type", "list_type", "set_type")
_NO_TLS = frozenset({"certificate", "key_file", "ca", "ssl_certfile", "ssl_keyfile"})


@dataclass(frozen=True, slots=True)
class Explainer:
    """Explains the errors of a model or type `root`.

    Without `shown`, no message has a value: one may be a secret. `patterns` says what text that does not match a
    pattern is not, and what to write.
    """

    root: Any
    shown: Shown | None = None
    patterns: Mapping[str, tuple[str, str]] = field(default_factory=lambda: PATTERNS)

    def violations(self, error: ValidationError) -> Iterator[Violation]:
        """Yield what is wrong, and what to write instead."""
        for details in error.errors(include_url=False):
            location, kind = details["loc"], details["type"]
            if location and location[-1] == "[key]":
                location = location[:-1]
                yield Violation(location, *self._pattern(details, f"'{printable(location[-1])}' "))
            elif kind == "extra_forbidden":
                yield Violation(location, "unknown key", self._unknown(location))
            elif kind == "string_pattern_mismatch":
                yield Violation(location, *self._pattern(details, self._got(details, "{} ")))
            else:
                known = known_keys(location, self.root) if kind in _MAPPINGS else []
                yield Violation(location, *_words(details, self._got(details, "{}"), known))

    def _got(self, details: ErrorDetails, form: str) -> str:
        """Describe the value that was given; "" if it may be a secret."""
        if self.shown is None or _is_secret(details["loc"], self.root):
            return ""
        return form.format(self.shown(details["loc"], details.get("input")))

    def _unknown(self, location: Location) -> str:
        name = str(location[-1])
        if location[:-1] == ("gateway",) and name in _NO_TLS:
            return "set certificate and key_file under gateway.tls"
        if len(location) == 1 and name.startswith(("x-", ".")):
            return "write the &anchor where it is used first, then <<: *anchor"
        return closest(name, known_keys(location[:-1], self.root))

    def _pattern(self, details: ErrorDetails, subject: str) -> tuple[str, str]:
        """Explain text that does not match the pattern of its option."""
        context = details.get("ctx", {})
        if "max_length" in context:
            return f"has more than {context['max_length']} characters", "shorten it"
        what, hint = self.patterns.get(context.get("pattern", ""), ("is not valid", _SEE))
        return f"{subject}{what}", hint


def _words(details: ErrorDetails, given: str, known: Sequence[str]) -> tuple[str, str]:
    kind, location, value = details["type"], details["loc"], details.get("input")
    got = f", got {given}" if given else ""
    name = str(location[-1]) if location else ""
    if kind == "missing":
        return "is missing", f"add '{name}: ...'"
    if value is None:
        return "is empty", _fill(kind)
    if kind in _MAPPINGS:
        names = f" of {', '.join(known)}" if known else ""
        return f"must be a mapping{got}", f"write 'name: value' lines{names}"
    if kind in _LISTS:
        entry = printable(value) if got and isinstance(value, str | int) else "..."
        return f"must be a list{got}", f"write [{entry}]"
    if kind == "string_type":
        return f"must be text{got}", "put it in quotes" if isinstance(value, int | float) else "write a single value"
    if kind.startswith("bool"):
        return f"must be true or false{got}", "write true or false"
    if kind.startswith("int"):
        return f"must be a whole number{got}", "write digits only"
    if kind.startswith("float"):
        return f"must be a number{got}", _number(str(value))
    return _of_value(details, given)


def _of_value(details: ErrorDetails, given: str) -> tuple[str, str]:
    """Explain a value that has the right type."""
    got = f", got {given}" if given else ""
    kind, context = details["type"], details.get("ctx", {})
    if kind in _BOUNDS:
        key, words, other = _BOUNDS[kind]
        share = _share(details.get("input")) if context[key] == _LARGEST_SHARE else ""
        return f"{words} {context[key]:g}{got}", share or f"choose {other} number"
    match kind:
        case "finite_number":
            return f"must be a finite number{got}", "write a number, such as 86400"
        case "literal_error":
            expected = context["expected"].lower()
            return f"must be {expected}{got}", _nearest(str(details.get("input")), expected)
        case "string_too_short" | "too_short":
            return "is empty", "write a value" if isinstance(details.get("input"), str) else "add an entry"
        case "string_too_long":
            return f"has more than {context['max_length']} characters", "shorten it"
        case "too_long":
            return f"has more than {context['max_length']} entries", "remove some"
        case "value_error":  # of a validator of this project
            what, _, hint = str(context["error"]).partition("; ")
            text = repr(details.get("input"))
            return (given + what.removeprefix(text)).strip() if what.startswith(text) else what, hint
    return f"is not valid{got}", _SEE


def _fill(kind: str) -> str:
    if kind in _MAPPINGS:
        return "indent its entries below it, or remove the line"
    if kind in _LISTS:
        return "write its entries below it, or [] for none"
    return "write a value, or remove the line"


def _number(text: str) -> str:
    if _PERCENT.fullmatch(text):
        return _share(text.rstrip("% "))
    return "write the number without a unit" if _WITH_UNIT.fullmatch(text) else "write digits, such as 0.5"


def _share(value: object) -> str:
    """Return how a percentage is written as a share; "" if the value is none."""
    try:
        percent = float(str(value))
    except ValueError:
        return ""
    return f"write {percent / 100:g} for {percent:g} %" if 1 < percent <= 100 else ""


def _nearest(given: str, expected: str) -> str:
    hint = closest(given, re.findall(r"'([^']*)'", expected))
    return hint if hint.startswith("did you mean") else f"write {'one of them' if ' or ' in expected else expected}"


def known_keys(location: Location, root: Any = Settings) -> list[str]:
    """Return the keys that a model allows at a location; empty for a table with user-defined names."""
    model = _model(_type_at(location, root))
    return list(model.model_fields) if model else []


def _is_secret(location: Location, root: Any) -> bool:
    return _has_secret(_type_at(location, root))


def _has_secret(kind: Any) -> bool:
    return kind is SecretStr or any(map(_has_secret, get_args(kind)))


def _type_at(location: Location, root: Any) -> Any:
    kind: Any = root
    for part in location:
        kind = _inside(kind, part)
    return kind


def _inside(kind: Any, part: str | int) -> Any:
    model = _model(kind)
    if model is not None:
        field_info = model.model_fields.get(str(part))
        return field_info.annotation if field_info else None
    while get_origin(kind) is Annotated or (get_origin(kind) in (Union, UnionType)):
        kind = get_args(kind)[0]
    arguments = get_args(kind)
    return arguments[1 if get_origin(kind) in (dict, Mapping) else 0] if arguments else None


def _model(kind: Any) -> type[BaseModel] | None:
    if get_origin(kind) is Annotated or get_origin(kind) in (Union, UnionType):
        return next(filter(None, map(_model, get_args(kind))), None)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
