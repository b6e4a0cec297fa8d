"""Decompresses request bodies with `content-encoding: gzip` as they arrive, within the body limit."""

import zlib

from gateway.errors import RequestError, UnsupportedEncoding
from gateway.http.limits import body_too_large

_GZIP_FORMAT = 16 + zlib.MAX_WBITS
# RFC 1952, section 2.2: a file is a series of members. A new decompressor for each of many tiny ones would be a cheap
# way to keep the process busy; programs that write members begin one every 64 KiB, or less often.
MAX_MEMBERS = 4096
_NAMES = frozenset({b"gzip", b"x-gzip"})  # RFC 9110, section 8.4.1.3: recipients treat both alike


class GzipDecoder:
    """Decoder of one body, of one or more gzip members; it never holds more decompressed bytes than the limit."""

    __slots__ = ("_decompressor", "_limit_bytes", "_members", "_total_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self._decompressor = zlib.decompressobj(_GZIP_FORMAT)
        self._limit_bytes = limit_bytes
        self._members = 1
        self._total_bytes = 0

    def decode(self, data: bytes) -> bytes:
        """Decompress the next piece; BodyTooLarge beyond the limit, RequestError if it is not gzip."""
        pieces = []
        while data:
            if self._decompressor.eof:
                self._begin_member()
            pieces.append(self._decompress(data))
            data = self._decompressor.unused_data
        return b"".join(pieces)

    def finish(self) -> None:
        """Check at the end of the body; RequestError if the gzip stream is incomplete."""
        if not self._decompressor.eof:
            raise RequestError("the gzip body is incomplete")

    def _begin_member(self) -> None:
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise RequestError(f"the gzip body has more than {MAX_MEMBERS} members")
        self._decompressor = zlib.decompressobj(_GZIP_FORMAT)

    def _decompress(self, data: bytes) -> bytes:
        try:
            # One byte more than is permitted shows that there is more.
            decoded = self._decompressor.decompress(data, self._limit_bytes - self._total_bytes + 1)
        except zlib.error as error:
            raise RequestError(f"the body is not valid gzip: {error}") from error
        self._total_bytes += len(decoded)
        if self._total_bytes > self._limit_bytes:
            raise body_too_large(self._limit_bytes)
        return decoded


def decoder_for(encoding: bytes, limit_bytes: int) -> GzipDecoder | None:
    """Return a decoder for a `content-encoding`, None if there is nothing to decode; UnsupportedEncoding otherwise."""
    name = encoding.strip().lower()
    if name in _NAMES:
        return GzipDecoder(limit_bytes)
    if name in {b"", b"identity"}:
        return None
    shown = encoding.decode("latin-1")[:100]
    raise UnsupportedEncoding(f"content-encoding {shown!r} is not supported; send gzip, or the body as it is")
