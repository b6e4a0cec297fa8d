"""What a flag's text means; argparse turns an ArgumentTypeError into one line and exit code 2."""

import argparse
from pathlib import Path

from pydantic import ValidationError

from config.field_types import check_url, parse_size_bytes
from quantize.planning.recipe_file import limit_names
from quantize.planning.recipe_schema import OverrideTable, parse_share
from quantize.planning.request import TextFile


def override(text: str) -> OverrideTable:
    """Read `PATTERN=8`, `PATTERN=4:32` or `PATTERN=keep`."""
    modules, _, numbers = text.rpartition("=")
    bits, _, group_size = numbers.partition(":")
    values = {"keep": True} if numbers == "keep" else {"bits": bits, "group_size": group_size or None}
    try:
        one = OverrideTable.model_validate({"modules": modules, **values})
    except ValidationError:
        one = None
    if one is None or one.bits not in (None, 4, 8):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=4, PATTERN=8, PATTERN=BITS:GROUP or PATTERN=keep")
    return one


def text_file(text: str) -> TextFile:
    """Read `FILE` or `FILE=WEIGHT`; a file whose very name ends so is taken as it is."""
    path, _, weight = text.rpartition("=")
    if not path or Path(text).is_file():
        return TextFile(Path(text))
    try:
        return TextFile(Path(path), float(weight))
    except ValueError:
        return TextFile(Path(text))


def gpus(text: str) -> tuple[int, ...]:
    """Read GPU numbers with commas between them."""
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different GPU numbers, like 2,5")
    return tuple(map(int, numbers))


def size(text: str) -> int:
    """Read `19GB`, `70MiB` or a number of bytes."""
    try:
        size_bytes = parse_size_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    assert isinstance(size_bytes, int)
    return size_bytes


def share(text: str) -> float:
    """Read `1%` or `0.01`."""
    try:
        value = parse_share(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    assert isinstance(value, float)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to below 1, like 1% or 0.01")
    return value


def address(text: str) -> str:
    """Read the root of a running server."""
    try:
        return check_url(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def limit(text: str) -> tuple[str, float]:
    """Read `NAME=VALUE` of a figure that can be limited."""
    name, _, value = text.partition("=")
    if name not in limit_names():
        raise argparse.ArgumentTypeError(f"{name!r} is no figure with a limit (one of: {', '.join(limit_names())})")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE") from None


def positive(text: str) -> int:
    """Read a whole number from 1 on."""
    return _at_least(text, 1)


def count(text: str) -> int:
    """Read a whole number from 0 on."""
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
    return int(text)
