"""Limits on requests that apply before a handler sees them, and the errors for exceeding them."""

from gateway.errors import BodyTooLarge, HeadTooLarge

HEAD_LIMIT_BYTES = 32 * 1024  # request line and headers; also chunk extensions and trailers
HEADER_LIMIT = 128
PIPELINED_LIMIT = 16  # complete requests that wait behind the one being answered
# A refused body up to this size is read to its end. Many clients write the whole body before they read the response,
# and the connection can be kept.
SHORT_BODY_BYTES = 256 * 1024
# At most this much of a longer refused body is read and dropped before the connection is closed.
LINGER_BYTES = 256 * 2**20
# Two parties could each pick another one of two such headers, so a duplicate is refused.
SINGLE_HEADERS = frozenset({b"host", b"content-type", b"authorization", b"x-api-key", b"api-key", b"x-request-id"})


def head_too_large() -> HeadTooLarge:
    """431: request line and headers are too long, or there are too many headers."""
    return HeadTooLarge(f"request line and headers exceed {HEAD_LIMIT_BYTES} bytes or {HEADER_LIMIT} headers")


def body_too_large(limit_bytes: int) -> BodyTooLarge:
    """413: the body exceeds the limit of its path."""
    return BodyTooLarge(f"the request body exceeds the limit of {limit_bytes} bytes")
