"""A bridge to ASGI apps, for everything that isn't in a hurry: routes that FastAPI serves."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

from gateway.http.request import Request
from gateway.http.response_writer import ResponseWriter, header_lines

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

# Who frames the message is the server.
_OWN = frozenset({b"content-length", b"transfer-encoding", b"connection", b"date"})


async def serve(app: App, request: Request, reply: ResponseWriter) -> None:
    """Have an app answer a request; its whole answer goes out at once. Spec: ASGI 3, HTTP 2.3."""
    status, headers, body = 500, list[tuple[bytes, bytes]](), list[bytes]()
    told = False

    async def receive() -> Message:
        nonlocal told
        if told:
            return {"type": "http.disconnect"}
        told = True
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            headers.extend(pair for pair in message["headers"] if pair[0].lower() not in _OWN)
        else:
            body.append(message.get("body", b""))

    await app(scope_of(request), receive, send)
    reply.send(status, header_lines(headers), b"".join(body))


def scope_of(request: Request) -> Message:
    """Describe a request to an app; the path comes from the request line, never from a header."""
    path, _, query = request.target.partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1" if request.supports_chunked else "1.0",
        "scheme": "http",
        "method": request.method.decode("latin-1"),
        "path": unquote(path.decode("latin-1")),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": list(request.headers.items()),
        "client": None,
        "server": None,
        "state": {"caller": request.caller},
    }
