"""Reads a flag out of the arguments that a replica's configuration adds for vLLM."""

from collections.abc import Sequence
from itertools import pairwise


def option(args: Sequence[str], flag: str) -> str | None:
    """The last value of a flag, written with a blank or with `=`."""
    values = [after for word, after in pairwise(args) if word == flag]
    values += [word.partition("=")[2] for word in args if word.startswith(f"{flag}=")]
    return values[-1] if values else None
