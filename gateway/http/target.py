"""Forms of a request target (RFC 9112, section 3.2)."""

import re

from gateway.errors import RequestError

_ABSOLUTE = re.compile(rb"https?://([^/?#@\s]+)(/[^#\s]*|\?[^#\s]*|)", re.IGNORECASE)


def origin_form(target: bytes) -> tuple[bytes, bytes]:
    """Return path with query and authority of an absolute-form target, which clients send to a configured proxy.

    Raises RequestError for any other form than `http://authority/path`.
    """
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise RequestError("invalid request target; send a path such as /v1/models, or an http URL without user name")
    authority, path = match.groups()
    return path if path.startswith(b"/") else b"/" + path, authority
