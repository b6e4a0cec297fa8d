"""Cross-origin resource sharing: which web pages may call the client port from a browser.

Spec: Fetch standard, "HTTP-CORS protocol". Keys travel in `authorization` and cookies are not used, so requests with
credentials are not permitted.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.http.request import Request

# Browsers cap it: Chromium at two hours.
MAX_AGE_SECONDS = 7200
_METHODS = b"GET, HEAD, POST"
# Responses reveal only the headers on a short list to a page unless they are named here.
_EXPOSED = b"*"
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,4096}")
_ANY = "*"


@dataclass(frozen=True, slots=True)
class Cors:
    """The origins whose pages may read responses; `any_origin` permits all of them."""

    origins: frozenset[bytes]
    any_origin: bool = False

    def permits(self, origin: bytes | None) -> bool:
        """Whether the pages of an origin may use the port."""
        return origin is not None and (self.any_origin or origin in self.origins)

    def headers(self, origin: bytes | None) -> bytes:
        """Header lines for any response to a request from an origin; None: it names none."""
        if self.any_origin:
            return b"access-control-allow-origin: *\r\naccess-control-expose-headers: %b\r\n" % _EXPOSED
        if origin is None or origin not in self.origins:
            return b"vary: origin\r\n"
        lines = b"vary: origin\r\naccess-control-allow-origin: %b\r\naccess-control-expose-headers: %b\r\n"
        return lines % (origin, _EXPOSED)


def cors_for(origins: tuple[str, ...]) -> Cors | None:
    """Return the policy for configured origins, None without any: no headers are sent."""
    if not origins:
        return None
    return Cors(frozenset(origin.encode() for origin in origins), any_origin=_ANY in origins)


def is_preflight(request: Request) -> bool:
    """Whether a browser asks if a page may send its actual request; it sends no key with that."""
    headers = request.headers
    return request.method == b"OPTIONS" and b"origin" in headers and b"access-control-request-method" in headers


def preflight_headers(headers: Mapping[bytes, bytes]) -> bytes:
    """Header lines that permit the announced request, with all its headers: `*` would not include `authorization`."""
    names = headers.get(b"access-control-request-headers", b"")
    permitted = b"access-control-allow-headers: %b\r\n" % names if _HEADER_NAMES.fullmatch(names) else b""
    return b"access-control-allow-methods: %b\r\n%baccess-control-max-age: %d\r\n" % (
        _METHODS,
        permitted,
        MAX_AGE_SECONDS,
    )
