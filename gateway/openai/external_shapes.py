"""Shapes of values that an external model gets; RequestError names the place of one that does not fit."""

from typing import Any

from gateway.errors import RequestError


def known(key: str, value: Any) -> dict[str, str]:
    """Return an optional text under its key; nothing if it is no text."""
    return {key: value} if isinstance(value, str) else {}


def objects(value: Any, where: str) -> list[dict[str, Any]]:
    """Require a list of objects."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise refused(where, "it is not a list of objects", "see OpenAI's API")
    return value


def require_object(value: Any, where: str) -> dict[str, Any]:
    """Require an object."""
    if not isinstance(value, dict):
        raise refused(where, "it is not an object", "see OpenAI's API")
    return value


def require_text(value: Any, where: str) -> str:
    """Require a text."""
    if not isinstance(value, str):
        raise refused(where, "it is not a text", "see OpenAI's API")
    return value


def refused(where: str, why: str, instead: str) -> RequestError:
    """400: an external model does not get this part of a request."""
    return RequestError(f"{where!r} is not passed to an external model: {why}; {instead}", param=where)
