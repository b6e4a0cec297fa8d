"""What a prompt begins with, as numbers that can be compared: two prompts share a block if they agree up to its end."""

from collections.abc import Iterable
from struct import Struct

BLOCK_BYTES = 256
# What lies behind them decides no more: a replica that holds so much of a prompt is the one to ask.
MOST_BLOCKS = 256

_BLOCK = Struct(f"{BLOCK_BYTES}s")


def block_hashes(parts: Iterable[bytes], salt: bytes = b"") -> tuple[int, ...]:
    """Hash each whole block of the parts' first 64 KiB together with all before it; prompts with other salts differ.

    Python salts its hashes anew in every process: they mean nothing outside of it, and no client can aim at one.
    """
    begins = _beginning(parts)
    whole_bytes = len(begins) // BLOCK_BYTES * BLOCK_BYTES
    previous = hash(salt)
    blocks = []
    for block in _BLOCK.iter_unpack(memoryview(begins)[:whole_bytes]):
        previous = hash((previous, block))
        blocks.append(previous)
    return tuple(blocks)


def _beginning(parts: Iterable[bytes]) -> bytes:
    """As much of the parts as is hashed; no more of them is copied."""
    left_bytes = BLOCK_BYTES * MOST_BLOCKS
    pieces = []
    for part in parts:
        pieces.append(memoryview(part)[:left_bytes])
        left_bytes -= len(pieces[-1])
        if not left_bytes:
            break
    return b"".join(pieces)
