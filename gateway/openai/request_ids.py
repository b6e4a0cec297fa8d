"""The id of a request: the client's own if it is a sane one, otherwise one made here."""

import re
import secrets
from collections.abc import Mapping
from itertools import count

_SANE = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class RequestIds:
    """Makes ids that nobody else makes: a random part for the process, and a count."""

    __slots__ = ("_numbers", "_prefix")

    def __init__(self) -> None:
        self._prefix = f"req-{secrets.token_hex(8)}-"
        self._numbers = count(1)

    def of(self, headers: Mapping[bytes, bytes]) -> str:
        """Say what a request with these headers is called."""
        given = headers.get(b"x-request-id")
        if given is not None and _SANE.fullmatch(given):
            return given.decode()
        return f"{self._prefix}{next(self._numbers):x}"
