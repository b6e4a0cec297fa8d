"""Who may ask the admin port: whoever has its key, and no browser on behalf of somebody's page."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from gateway.errors import GatewayError, InvalidKey, NotAllowed

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# What probes ask, which carry no key; they tell no more than that.
OPEN_PATHS = frozenset({"/livez", "/readyz"})
# https://www.w3.org/TR/fetch-metadata/: what a person typed, or no browser at all.
OWN_SITE = frozenset({b"none", b"same-origin"})


@dataclass(frozen=True, slots=True)
class AdminAuth:
    """Stands before an app; `digest` is the SHA-256 of the key, None where none is asked for."""

    app: App
    digest: bytes | None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                self._check(dict(scope["headers"]))
            except GatewayError as refusal:
                await _tell(send, refusal)
                return
        await self.app(scope, receive, send)

    def _check(self, headers: dict[bytes, bytes]) -> None:
        if b"origin" in headers or headers.get(b"sec-fetch-site", b"none") not in OWN_SITE:
            raise NotAllowed("the admin port answers no web page", code="browser_refused")
        if self.digest is None:
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else b""
        if not hmac.compare_digest(hashlib.sha256(given).digest(), self.digest):
            raise InvalidKey("send 'authorization: Bearer KEY' with the key of gateway.admin_key")


async def _tell(send: Send, refusal: GatewayError) -> None:
    body = refusal.body()
    length = (b"content-length", str(len(body)).encode())
    headers = [(b"content-type", b"application/json"), length, *refusal.headers()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
