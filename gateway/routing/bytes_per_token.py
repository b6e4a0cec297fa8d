"""How many bytes of a prompt make a token, learned from what engines report."""

import msgspec

FIRST_GUESS = 4.0
LEAST, MOST = 0.5, 16.0
# Of so many later prompts of the same length, the share of an earlier one is half.
HALF_LIFE_PROMPTS = 100
# No prompt counts for more, so that a single long one doesn't outweigh all others.
_HEAVIEST_TOKENS = 32_768
_KEPT = 0.5 ** (1 / HALF_LIFE_PROMPTS)


class BytesPerToken(msgspec.Struct, frozen=True, gc=False):
    """A ratio of sums in which older prompts weigh less and less; long prompts weigh more than short ones."""

    sum_bytes: float = FIRST_GUESS * 256
    sum_tokens: float = 256.0

    @property
    def ratio(self) -> float:
        """Bytes that make a token, from 0.5 to 16."""
        return self.sum_bytes / self.sum_tokens


def learned(known: BytesPerToken, prompt_bytes: int, prompt_tokens: int | None) -> BytesPerToken:
    """Count one answer's usage; without any it stays as it was.

    A prompt out of range counts as one at its edge: a picture's bytes say little about text.
    """
    if not prompt_tokens or prompt_tokens < 0 or prompt_bytes <= 0:
        return known
    ratio = prompt_bytes / prompt_tokens
    if not LEAST <= ratio <= MOST:
        ratio = LEAST if ratio < LEAST else MOST
    tokens = min(_HEAVIEST_TOKENS, prompt_tokens)
    return BytesPerToken(known.sum_bytes * _KEPT + ratio * tokens, known.sum_tokens * _KEPT + tokens)
