"""Authentication of the admin port: its own key where one is configured, and no requests from web pages but its own.

There are no cookies: what a browser sends by itself carries no credential. A page of another site is refused by
`Origin` and `Sec-Fetch-Site`, and one that lets its name resolve to loopback by `Host` (gateway/http/hosts.py).

HEAD is answered as GET, with the headers only: its response is complete with them, even if the body has no end.
"""

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gateway.errors import GatewayError, InvalidKey, NotAllowed
from gateway.http.asgi import App, Message, with_head_allowed
from gateway.http.hosts import AllowedHosts

Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Probes carry no key; these paths reveal nothing but the status.
PUBLIC_PATHS = frozenset({"/livez", "/readyz"})
# The files of the page hold no data; it sends the key itself.
PUBLIC_FOLDER = "/ui"
# https://www.w3.org/TR/fetch-metadata/: typed by a person, or not from a browser.
OWN_SITE = frozenset({b"none", b"same-origin"})


@dataclass(frozen=True, slots=True)
class AdminAuth:
    """ASGI middleware; `digest` is the SHA-256 of the key, None if no key is required.

    `hosts` are the names under which the port may be addressed; None: any.
    """

    app: App
    digest: bytes | None
    hosts: AllowedHosts | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            try:
                self._check(scope["path"], dict(scope["headers"]))
            except GatewayError as refusal:
                await _refuse(send, refusal)
                return
            if scope["method"] == "HEAD":
                scope, send = {**scope, "method": "GET"}, _headers_only(send)
            send = _head_allowed(send)
        await self.app(scope, receive, send)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.hosts is not None:
            self.hosts.check(headers.get(b"host"))
        if path in PUBLIC_PATHS or path == PUBLIC_FOLDER or path.startswith(f"{PUBLIC_FOLDER}/"):
            return
        if not _is_own_origin(headers) or headers.get(b"sec-fetch-site", b"none") not in OWN_SITE:
            raise NotAllowed("the admin port refuses requests from web pages", code="browser_refused")
        if self.digest is None:
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else b""
        if not given or not hmac.compare_digest(hashlib.sha256(given).digest(), self.digest):
            raise InvalidKey("send 'authorization: Bearer KEY' with the key of gateway.admin_key")


def _is_own_origin(headers: dict[bytes, bytes]) -> bool:
    """Whether a request is of no page, or of a page of this very port."""
    origin, host = headers.get(b"origin"), headers.get(b"host")
    return origin is None or (host is not None and origin in (b"http://" + host, b"https://" + host))


def _head_allowed(send: Send) -> Send:
    async def send_with_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = list(with_head_allowed(message.get("headers", ())))
        await send(message)

    return send_with_head


def _headers_only(send: Send) -> Send:
    """End a response after its headers; the app then learns from `receive` that nobody reads its body."""

    async def send_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b""})

    return send_headers


async def _refuse(send: Send, refusal: GatewayError) -> None:
    body = refusal.body()
    length = (b"content-length", str(len(body)).encode())
    headers = [(b"content-type", b"application/json"), length, *refusal.headers()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
