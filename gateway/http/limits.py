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
# Each of these repeated headers restricts the request further, so their values are kept apart, by line feeds, which no
# value contains: a list in one header means any of its entries.
SEPARATE_HEADERS = frozenset({b"x-quantgate-floor", b"x-quantgate-precision"})
# Bodies up to SHORT_BODY_BYTES may use all of the memory for bodies; longer ones leave this part of it to them.
SHORT_BODIES_SHARE = 0.125


def head_too_large() -> HeadTooLarge:
    """431: request line and headers are too long, or there are too many headers."""
    return HeadTooLarge(f"request line and headers exceed {HEAD_LIMIT_BYTES} bytes or {HEADER_LIMIT} headers")


def body_too_large(limit_bytes: int) -> BodyTooLarge:
    """413: the body exceeds the limit of its path."""
    return BodyTooLarge(f"the request body exceeds the limit of {limit_bytes} bytes")


def may_hold(size_bytes: int, body_bytes: int, owner_bytes: int | None, used_bytes: int, memory_bytes: int) -> bool:
    """Whether a piece of `size_bytes` fits into the memory for bodies.

    `body_bytes` is its body so far, `owner_bytes` what its owner holds (None: nobody is accounted for), both without
    it. An owner may hold as much as is then free, so one owner gets half of the memory, two get a third each, and there
    is always some left for another one: "dynamic queue length thresholds", Choudhury and Hahne, 1998.
    """
    free_bytes = memory_bytes - used_bytes - size_bytes
    if body_bytes + size_bytes > SHORT_BODY_BYTES and free_bytes < memory_bytes * SHORT_BODIES_SHARE:
        return False
    return free_bytes >= (0 if owner_bytes is None else owner_bytes + size_bytes)
