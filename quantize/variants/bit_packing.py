"""Integers of a few bits <-> int32 words of 32/bits of them, lowest bits first."""

from typing import Any

WORD_BITS = 32


def pack_rows(values: Any, bits: int) -> Any:
    """[R, C] int32 values of `bits` bits -> [R*bits/32, C] int32 words of consecutive rows."""
    import torch  # noqa: PLC0415

    apart = values.reshape(-1, WORD_BITS // bits, values.shape[1])
    packed = torch.zeros_like(apart[:, 0])
    for index in range(apart.shape[1]):
        packed |= apart[:, index] << (bits * index)
    return packed


def pack_columns(values: Any, bits: int) -> Any:
    """[R, C] int32 values of `bits` bits -> [R, C*bits/32] int32 words of consecutive columns."""
    return pack_rows(values.t(), bits).t()


def unpack_rows(words: Any, bits: int) -> Any:
    """[R*bits/32, C] int32 words -> [R, C] int32 values of `bits` bits, packed along the first axis."""
    import torch  # noqa: PLC0415

    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32).view(1, -1, 1)
    return ((words.unsqueeze(1) >> shifts) & ((1 << bits) - 1)).reshape(-1, words.shape[1])


def unpack_columns(words: Any, bits: int) -> Any:
    """[R, C*bits/32] int32 words -> [R, C] int32 values of `bits` bits, packed along the second axis."""
    return unpack_rows(words.t().contiguous(), bits).t()
