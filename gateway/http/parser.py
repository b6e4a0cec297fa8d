"""Parses the requests of one connection: the callback object of httptools' parser (llhttp). Wire format: RFC 9112.

llhttp is strict. What it tolerates but two parties could read differently (duplicates of some headers) or what it does
not limit (size of head, trailers and chunk extensions) is refused here.

===============  =========================  ==================================================================
state            event                      next state
===============  =========================  ==================================================================
idle             first byte of a request    head
head             headers complete           body
head             ... and refused            discarding, if the body is short; else dropping
head             ... and offers an upgrade  body, by another parser: the offer is ignored (upgrade.py)
body             data                       body; memory is reserved for it
body             too long, or no memory     discarding, if the body is short; else dropping
body             request complete           idle; the request goes to the sink
discarding       request complete           idle; the refused request goes to the sink
all of these     invalid bytes, too large   dropping; the refused request goes to the sink
                 a head, `refuse` called
dropping         bytes                      dropping; `dropping` is the number of bytes still to be ignored
any              `abandon` called           idle; reserved memory is released
===============  =========================  ==================================================================

discarding: `request.refusal` is set, the rest of the body is parsed but not kept, and the connection stays usable.
dropping: the refused request went to the sink before it was complete. The parser is not fed any more: the connection
counts and drops what still arrives, and closes after the response. A body is short if its `content-length` is at most
SHORT_BODY_BYTES and the client does not wait for `100 Continue`.
"""

from typing import NoReturn, Protocol

import httptools

from gateway.errors import GatewayError, Overloaded, RequestError
from gateway.http.content_encoding import GzipDecoder, decoder_for
from gateway.http.interfaces import ServerContext
from gateway.http.limits import (
    HEAD_LIMIT_BYTES,
    HEADER_LIMIT,
    LINGER_BYTES,
    SEPARATE_HEADERS,
    SHORT_BODY_BYTES,
    SINGLE_HEADERS,
    body_too_large,
    head_too_large,
)
from gateway.http.request import Request
from gateway.http.target import origin_form
from gateway.http.upgrade import parser_behind_head


class RequestSink(Protocol):
    """Receives what the parser reads: the connection."""

    def send_100_continue(self) -> None:
        """Send `100 Continue`: the head is admitted, and the client waits before it sends the body."""

    def on_request(self, request: Request) -> None:
        """Take a complete or refused request; raises RequestError if too many are pipelined."""


class RequestParser:
    """Incremental parser of one connection's requests.

    `request` is the one being read, with `body_bytes` of its body so far. `dropping` is None, or the number of bytes of
    a refused request that may still arrive (see the module's table).
    """

    def __init__(self, server: ServerContext, sink: RequestSink) -> None:
        self._server = server
        self._sink = sink
        self._parser = httptools.HttpRequestParser(self)
        self.request: Request | None = None
        self._headers: dict[bytes, bytes] = {}  # its headers
        self._head_bytes = 0
        self._head_read = False
        self._body: list[bytes] = []
        self.body_bytes = 0
        self._body_limit_bytes = 0
        self._decoder: GzipDecoder | None = None
        self._upgrade_with_body = False  # llhttp takes the current request's body for another protocol
        self._declared_bytes: int | None = None  # content-length; None with transfer-encoding: chunked
        self._short_body = True
        self.dropping: int | None = None

    @property
    def reading_request(self) -> bool:
        """Whether a request has begun, is not complete and was not refused early."""
        return self.request is not None and self.dropping is None

    def feed(self, data: bytes) -> None:
        """Parse received bytes; requests go to the sink. Must not be called while `dropping` is set."""
        body_bytes = self.body_bytes
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            # An error that a callback raised is the exception's context; without one, the bytes are invalid.
            raised = error.__context__
            invalid = RequestError(f"invalid HTTP/1.1 request: {error}")
            self.refuse(raised if isinstance(raised, GatewayError) else invalid)
        else:
            if self.request is not None and (not self._head_read or self.body_bytes == body_bytes):
                # Head, chunk extensions or trailers: llhttp limits none of them.
                self._head_bytes += len(data)
                if self._head_bytes > HEAD_LIMIT_BYTES:
                    self.refuse(head_too_large())

    def refuse(self, refusal: GatewayError) -> None:
        """Pass the current request on as refused, and parse nothing more of this connection."""
        if self.dropping is not None:
            return
        self.dropping = LINGER_BYTES
        request = self.request or Request()
        self._set_refusal(request, refusal)
        self._sink.on_request(request)

    def abandon(self) -> None:
        """Release the memory of an incomplete request; called when the connection is lost."""
        if self.request is not None:
            self._server.release(self.request)
            self.request = None

    # Callbacks of httptools

    def on_message_begin(self) -> None:
        self.request = request = Request()
        self._headers = request.headers
        self._head_bytes = self.body_bytes = self._body_limit_bytes = 0
        self._head_read = False

    def on_url(self, url: bytes) -> None:
        (self.request or _no_message()).target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        headers = self._headers
        name = name.lower()
        if name in headers:
            if name in SINGLE_HEADERS:
                raise RequestError(f"duplicate header {name.decode('latin-1')!r}; send it once")
            value = headers[name] + (b"\n" if name in SEPARATE_HEADERS else b", ") + value
        headers[name] = value

    def on_headers_complete(self) -> None:
        request = self.request or _no_message()
        self._head_read = True
        self._headers = {}  # trailers are read into it: they must not change what the head said
        request.method = self._parser.get_method()
        headers, version = request.headers, self._parser.get_http_version()
        if version != "1.1":
            request.supports_chunked = False
            if version != "1.0":
                raise RequestError("only HTTP/1.0 and HTTP/1.1 are supported")
        elif b"host" not in headers:
            raise RequestError("the header 'host' is missing")
        if not request.target.startswith(b"/"):
            self._read_target(request)
        if len(headers) > HEADER_LIMIT or len(request.target) > HEAD_LIMIT_BYTES:
            raise head_too_large()
        self._admit(request)
        if b"upgrade" in headers and self._parser.should_upgrade():
            self._upgrade_with_body = self._declared_bytes != 0

    def on_body(self, data: bytes) -> None:
        request, size_bytes = self.request or _no_message(), len(data)
        self.body_bytes += size_bytes
        self._head_bytes = 0
        if self.dropping is not None:
            self.dropping -= size_bytes
            return
        if request.refusal is None:
            try:
                self._keep(request, data)
            except GatewayError as refusal:
                self._set_refusal(request, refusal)
            else:
                return
        if not self._short_body:
            self._refuse_early(request)

    def on_message_complete(self) -> None:
        request = self.request or _no_message()
        if self.dropping is not None:
            self._server.release(request)
            return  # It went to the sink when it was refused, or it follows one that was.
        if self._upgrade_with_body:
            return  # Its body follows, for another parser.
        if self._decoder is not None and request.refusal is None:
            self._finish_decoding(request, self._decoder)
        request.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        request.keep_alive = self._parser.should_keep_alive()
        self.request = None
        self._sink.on_request(request)

    # Reading

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Go on behind a head that offers another protocol."""
        if self.dropping is not None:
            self.dropping -= len(rest)
            return
        if self._upgrade_with_body:
            self._upgrade_with_body = False
            headers, keep_alive = (self.request or _no_message()).headers, self._parser.should_keep_alive()
            self._parser = parser_behind_head(self, headers, keep_alive=keep_alive)
        if rest:
            self.feed(rest)

    def _read_target(self, request: Request) -> None:
        """Accept an absolute URL, whose authority replaces the header (RFC 9112, 3.2.2), and `OPTIONS *`."""
        if request.method == b"CONNECT":
            raise RequestError("CONNECT is not supported: this is no forward proxy; send requests to it directly")
        if request.target != b"*":
            request.target, request.headers[b"host"] = origin_form(request.target)

    def _keep(self, request: Request, data: bytes) -> None:
        """Add a piece to the body; raises GatewayError if it is too long, invalid or finds no memory."""
        if self.body_bytes > self._body_limit_bytes:
            raise body_too_large(self._body_limit_bytes)
        if self._decoder is not None:
            data = self._decoder.decode(data)
        if not self._server.reserve(request, len(data)):
            raise Overloaded("the gateway's memory for request bodies is in use; retry later", retry_after_seconds=2)
        self._body.append(data)

    def _finish_decoding(self, request: Request, decoder: GzipDecoder) -> None:
        try:
            decoder.finish()
        except GatewayError as refusal:
            self._set_refusal(request, refusal)
        del request.headers[b"content-encoding"]  # the body is not encoded any more

    # Refusing

    def _admit(self, request: Request) -> None:
        headers = request.headers
        declared = int(headers.get(b"content-length", b"0"))
        self._declared_bytes = None if b"transfer-encoding" in headers else declared
        awaits_100 = b"expect" in headers and request.supports_chunked and headers[b"expect"].lower() == b"100-continue"
        self._short_body = self._declared_bytes is not None and declared <= SHORT_BODY_BYTES and not awaits_100
        try:
            self._body_limit_bytes = self._server.handler.admit(request)
            if declared > self._body_limit_bytes:
                request.refusal = body_too_large(self._body_limit_bytes)
            encoding = headers.get(b"content-encoding")
            self._decoder = None if encoding is None else decoder_for(encoding, self._body_limit_bytes)
        except GatewayError as refusal:
            request.refusal = refusal
        if request.refusal is None:
            if awaits_100:
                self._sink.send_100_continue()
        elif not self._short_body:
            self._refuse_early(request)

    def _set_refusal(self, request: Request, refusal: GatewayError) -> None:
        request.refusal = refusal
        self._body.clear()
        self._server.release(request)

    def _refuse_early(self, request: Request) -> None:
        """Pass a refused request on before its body has arrived: the client gets the response sooner."""
        if self.dropping is None:
            declared = self._declared_bytes
            remaining = LINGER_BYTES if declared is None else declared - self.body_bytes
            self.dropping = min(remaining, LINGER_BYTES)
            self._sink.on_request(request)


def _no_message() -> NoReturn:
    raise RequestError("invalid HTTP/1.1 request: data after the end of the message")
