"""Request ids: the client's `x-request-id` if it is well-formed, otherwise a generated one."""

import re
import secrets
from collections.abc import Mapping
from itertools import count

_WELL_FORMED = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class RequestIds:
    """Generates ids that are unique across processes: a random prefix per process, and a counter."""

    __slots__ = ("_numbers", "_prefix")

    def __init__(self) -> None:
        self._prefix = f"req-{secrets.token_hex(8)}-"
        self._numbers = count(1)

    def of(self, headers: Mapping[bytes, bytes]) -> str:
        """Return the id of a request with these headers."""
        given = headers.get(b"x-request-id")
        if given is not None and _WELL_FORMED.fullmatch(given):
            return given.decode()
        return f"{self._prefix}{next(self._numbers):x}"
