"""Bounds on what a client may send before anybody knows what it wants, and what it hears beyond them."""

from gateway.errors import BodyTooLarge, HeadTooLarge

HEAD_LIMIT_BYTES = 32 * 1024
HEADER_LIMIT = 128
PIPELINED_LIMIT = 16
# A refused body up to this long is read to its end, so that the client, which writes before it reads, hears why.
SHORT_BODY_BYTES = 256 * 1024
LINGER_BYTES = 256 * 2**20
# One of these twice could be read in two ways by two parties.
SINGLE_HEADERS = frozenset({b"host", b"content-type", b"authorization", b"x-api-key", b"api-key", b"x-request-id"})


def head_too_large() -> HeadTooLarge:
    """Request line and headers are too much."""
    return HeadTooLarge(f"request line and headers exceed {HEAD_LIMIT_BYTES} bytes or {HEADER_LIMIT} headers")


def body_too_large(limit_bytes: int) -> BodyTooLarge:
    """A body is too long for what it is sent to."""
    return BodyTooLarge(f"the body is longer than {limit_bytes} bytes")
