"""Hashes of the beginning of a prompt: two prompts share a block if they agree up to its end."""

from collections.abc import Sequence

BLOCK_BYTES = 256
# The rest of a prompt decides no more: a replica that holds so much of it is the one to ask.
MAX_BLOCKS = 256
_MAX_BYTES = BLOCK_BYTES * MAX_BLOCKS


def block_hashes(parts: Sequence[bytes], salt: bytes = b"") -> tuple[int, ...]:
    """Hash each whole block of the parts' first 64 KiB together with all before it; other salts give other hashes.

    Python salts its hashes anew in every process: they mean nothing outside of it, and no client can aim at one.
    """
    text = bytes(parts[0]) if len(parts) == 1 and len(parts[0]) <= _MAX_BYTES else _beginning(parts)
    previous = hash(bytes(salt))
    blocks = []
    for start in range(0, len(text) - BLOCK_BYTES + 1, BLOCK_BYTES):
        previous = hash((previous, text[start : start + BLOCK_BYTES]))
        blocks.append(previous)
    return tuple(blocks)


def _beginning(parts: Sequence[bytes]) -> bytes:
    """As much of the parts as is hashed; no more of them is copied."""
    left_bytes = _MAX_BYTES
    pieces = []
    for part in parts:
        pieces.append(memoryview(part)[:left_bytes])
        left_bytes -= len(pieces[-1])
        if not left_bytes:
            break
    return b"".join(pieces)
