"""The number of bytes per token of a prompt, learned from the usage that engines report."""

import msgspec

INITIAL_RATIO = 4.0
MIN_RATIO, MAX_RATIO = 0.5, 16.0
# After this number of further prompts of the same length, the weight of a prompt has halved.
HALF_LIFE_PROMPTS = 100
# The maximum weight of a prompt; otherwise a single long one would outweigh all others.
_MAX_WEIGHT_TOKENS = 32_768
_DECAY = 0.5 ** (1 / HALF_LIFE_PROMPTS)


class BytesPerToken(msgspec.Struct, frozen=True, gc=False):
    """A ratio of exponentially decaying sums: newer and longer prompts have more weight."""

    sum_bytes: float = INITIAL_RATIO * 256
    sum_tokens: float = 256.0

    @property
    def ratio(self) -> float:
        """Bytes per token, from 0.5 to 16."""
        return self.sum_bytes / self.sum_tokens


def learned(known: BytesPerToken, prompt_bytes: int, prompt_tokens: int | None) -> BytesPerToken:
    """Add the prompt of an answer with usage; without usage (None, or not positive) `known` is returned.

    The ratio of a prompt is clamped: the bytes of an image say little about text.
    """
    if not prompt_tokens or prompt_tokens < 0 or prompt_bytes <= 0:
        return known
    ratio = prompt_bytes / prompt_tokens
    if not MIN_RATIO <= ratio <= MAX_RATIO:
        ratio = MIN_RATIO if ratio < MIN_RATIO else MAX_RATIO
    tokens = min(_MAX_WEIGHT_TOKENS, prompt_tokens)
    return BytesPerToken(known.sum_bytes * _DECAY + ratio * tokens, known.sum_tokens * _DECAY + tokens)
