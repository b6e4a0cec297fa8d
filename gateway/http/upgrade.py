"""Reads a request that offers an upgrade to another protocol as plain HTTP/1.1: a server may ignore the offer.

RFC 9110, section 7.8. Java's HttpClient and `curl --http2` offer `h2c` with every request. llhttp takes what follows
such a head for the other protocol, even the body, and httptools cannot tell it otherwise. So a new parser reads a head
that announces the same body without the offer, and then the rest of the connection.
"""

from typing import Protocol

import httptools


class ParserCallbacks(Protocol):
    """The callbacks of httptools' request parser."""

    def on_message_begin(self) -> None: ...
    def on_url(self, url: bytes) -> None: ...
    def on_header(self, name: bytes, value: bytes) -> None: ...
    def on_headers_complete(self) -> None: ...
    def on_body(self, data: bytes) -> None: ...
    def on_message_complete(self) -> None: ...


class _BehindHead:
    """Callbacks that hide the first head, which the owner has seen in its original form."""

    def __init__(self, owner: ParserCallbacks) -> None:
        self._owner = owner
        self._head_read = False
        self.on_body = owner.on_body
        self.on_message_complete = owner.on_message_complete

    def on_message_begin(self) -> None:
        if self._head_read:
            self._owner.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._head_read:
            self._owner.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_read:
            self._owner.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._head_read:
            self._owner.on_headers_complete()
        self._head_read = True


def parser_behind_head(
    owner: ParserCallbacks, headers: dict[bytes, bytes], *, keep_alive: bool
) -> "httptools.HttpRequestParser":
    """Return a parser that expects the body of a request with these headers, and further requests after it."""
    framing = b"transfer-encoding" if b"transfer-encoding" in headers else b"content-length"
    connection = b"keep-alive" if keep_alive else b"close"
    parser = httptools.HttpRequestParser(_BehindHead(owner))
    parser.feed_data(b"POST / HTTP/1.1\r\n%b: %b\r\nconnection: %b\r\n\r\n" % (framing, headers[framing], connection))
    return parser
