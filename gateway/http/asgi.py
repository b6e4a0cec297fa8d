"""Adapter that serves a request with an ASGI app: for FastAPI routes, which are not performance-critical."""

from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from typing import Any
from urllib.parse import unquote

from gateway.http.request import Request
from gateway.http.response_writer import ResponseWriter, header_lines

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

# Headers that this server writes itself; an app's are dropped.
_FRAMING_HEADERS = frozenset({b"content-length", b"transfer-encoding", b"connection", b"date"})


async def serve(app: App, request: Request, response: ResponseWriter) -> None:
    """Run an app on one request and send its response, buffered, at once. Spec: ASGI 3, HTTP 2.3."""
    status, headers, body = 500, list[tuple[bytes, bytes]](), list[bytes]()
    body_received = False

    async def receive() -> Message:
        nonlocal body_received
        if body_received:
            return {"type": "http.disconnect"}
        body_received = True
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            kept = (header for header in message["headers"] if header[0].lower() not in _FRAMING_HEADERS)
            headers.extend(with_head_allowed(kept))
        else:
            body.append(message.get("body", b""))

    await app(scope_of(request), receive, send)
    response.send(status, header_lines(headers), b"".join(body))


def scope_of(request: Request) -> Message:
    """Build the ASGI scope; the path comes from the request line, never from a header."""
    path, _, query = request.target.partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1" if request.supports_chunked else "1.0",
        "scheme": "http",
        # HEAD is answered as GET; the response writer leaves the body out.
        "method": "GET" if request.method == b"HEAD" else request.method.decode("latin-1"),
        "path": unquote(path.decode("latin-1")),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": list(request.headers.items()),
        "client": None,
        "server": None,
        "state": {"caller": request.caller},
    }


def with_head_allowed(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Add HEAD to an `allow` that names GET: an app sees GET for both. Names of an ASGI response are lowercase."""
    for name, value in headers:
        methods = [method.strip() for method in value.split(b",")] if name == b"allow" else []
        yield name, value + b", HEAD" if b"GET" in methods and b"HEAD" not in methods else value
