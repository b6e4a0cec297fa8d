"""Puts requests together from a connection's bytes: the target of httptools' parser. RFC 9112 is the wire format.

The parser is strict, and what it lets through twice or without an end is refused here: nothing can be read in two ways.
"""

from typing import Protocol

import httptools

from gateway.errors import GatewayError, Overloaded, RequestError
from gateway.http.interfaces import ServerContext
from gateway.http.limits import (
    HEAD_LIMIT_BYTES,
    HEADER_LIMIT,
    LINGER_BYTES,
    SHORT_BODY_BYTES,
    SINGLE_HEADERS,
    body_too_large,
    head_too_large,
)
from gateway.http.request import Request


class RequestSink(Protocol):
    """Who is read for."""

    def expect_within(self, seconds: float) -> None:
        """More of a request must come in time."""

    def send_100_continue(self) -> None:
        """Tell a client that waits for it that its body is welcome."""

    def on_request(self, request: Request) -> None:
        """A request is here, or refused before all of it is; RequestError if there are too many."""


class RequestParser:
    """Reads one request after the other; `dropping` is how much may still come of one that was refused, else None."""

    def __init__(self, house: ServerContext, listener: RequestSink) -> None:
        self._house = house
        self._listener = listener
        self._parser = httptools.HttpRequestParser(self)
        self._request: Request | None = None  # the one that is being read
        self._head_bytes = 0
        self._head_read = False
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._body_limit_bytes = 0
        self._declared_bytes: int | None = None  # of a body; None: its end is told when it comes
        self._short = True
        self.dropping: int | None = None

    @property
    def within_request(self) -> bool:
        """Tell whether a request has begun, and isn't refused."""
        return self._request is not None and self.dropping is None

    def feed(self, data: bytes) -> None:
        """Read on; requests go to the listener."""
        body_bytes = self._body_bytes
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.refuse(RequestError("this is HTTP/1.1 without upgrades; send plain requests"))
        except httptools.HttpParserError as error:
            # What a callback of ours refused is the reason; otherwise the bytes are.
            ours = error.__context__
            theirs = RequestError(f"this is no HTTP/1.1 request: {error}")
            self.refuse(ours if isinstance(ours, GatewayError) else theirs)
        else:
            if self._request is not None and (not self._head_read or self._body_bytes == body_bytes):
                # A head, or what a chunked body may have beside its data: neither is without an end.
                self._head_bytes += len(data)
                if self._head_bytes > HEAD_LIMIT_BYTES:
                    self.refuse(head_too_large())

    def refuse(self, refusal: GatewayError) -> None:
        """Have a client told what is wrong with what it sends, and read nothing more of it."""
        if self.dropping is not None:
            return
        self.dropping = LINGER_BYTES
        request = self._request or Request()
        self._refuse_body(request, refusal)
        self._listener.on_request(request)

    def abandon(self) -> None:
        """The connection is gone, and half a request with it."""
        if self._request is not None:
            self._house.release(self._request)
            self._request = None

    # What the parser does

    def on_message_begin(self) -> None:
        self._request = Request()
        self._head_bytes = 0
        self._head_read = False
        self._body_bytes = 0
        self._body_limit_bytes = 0
        self._listener.expect_within(self._house.timeouts.head_seconds)

    def on_url(self, url: bytes) -> None:
        self._present().target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        headers = self._present().headers
        name = name.lower()
        if name in headers:
            if name in SINGLE_HEADERS:
                raise RequestError(f"the header {name.decode('latin-1')!r} came twice; send it once")
            value = headers[name] + b", " + value
        headers[name] = value
        if len(headers) > HEADER_LIMIT:
            raise head_too_large()

    def on_headers_complete(self) -> None:
        request = self._present()
        self._head_read = True
        request.method = self._parser.get_method()
        version = self._parser.get_http_version()
        request.supports_chunked = version == "1.1"
        if version not in {"1.1", "1.0"}:
            raise RequestError("this is HTTP/1.1; send such requests")
        if request.supports_chunked and b"host" not in request.headers:
            raise RequestError("the header 'host' is missing")
        if b"upgrade" in request.headers:
            raise RequestError("this is HTTP/1.1 without upgrades; send no 'upgrade' header")
        if len(request.target) > HEAD_LIMIT_BYTES:
            raise head_too_large()
        self._admit(request)

    def on_body(self, data: bytes) -> None:
        request = self._present()
        self._listener.expect_within(self._house.timeouts.body_silence_seconds)
        self._body_bytes += len(data)
        self._head_bytes = 0
        if self.dropping is not None:
            self.dropping -= len(data)
            return
        if request.refusal is None:
            if self._body_bytes > self._body_limit_bytes:
                self._refuse_body(request, body_too_large(self._body_limit_bytes))
            elif not self._house.reserve(request, len(data)):
                self._refuse_body(request, Overloaded("too many large requests at once", retry_after_seconds=2))
            else:
                self._body.append(data)
        if request.refusal is not None and not self._short:
            self._answer_early(request)

    def on_message_complete(self) -> None:
        request = self._present()
        if self.dropping is not None:
            self._house.release(request)
            return  # It has been answered already, or nobody will.
        request.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        request.keep_alive = self._parser.should_keep_alive()
        self._request = None
        self._listener.on_request(request)

    # Refusing

    def _present(self) -> Request:
        if self._request is None:
            raise RequestError("this is no HTTP/1.1 request: bytes behind its end")
        return self._request

    def _admit(self, request: Request) -> None:
        declared = int(request.headers.get(b"content-length", b"0"))
        self._declared_bytes = None if b"transfer-encoding" in request.headers else declared
        asks_first = request.supports_chunked and request.headers.get(b"expect", b"").lower() == b"100-continue"
        self._short = self._declared_bytes is not None and declared <= SHORT_BODY_BYTES and not asks_first
        try:
            self._body_limit_bytes = self._house.handler.admit(request)
            if declared > self._body_limit_bytes:
                request.refusal = body_too_large(self._body_limit_bytes)
        except GatewayError as refusal:
            request.refusal = refusal
        if request.refusal is None:
            if asks_first:
                self._listener.send_100_continue()
        elif not self._short:
            self._answer_early(request)

    def _refuse_body(self, request: Request, refusal: GatewayError) -> None:
        request.refusal = refusal
        self._body.clear()
        self._house.release(request)

    def _answer_early(self, request: Request) -> None:
        """Have a refused request answered before the rest of it is here; that is read and dropped for a while."""
        if self.dropping is None:
            declared = self._declared_bytes
            left = LINGER_BYTES if declared is None else declared - self._body_bytes
            self.dropping = min(left, LINGER_BYTES)
            self._listener.on_request(request)
