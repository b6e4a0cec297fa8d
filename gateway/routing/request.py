"""What a decision needs to know of a request."""

import msgspec


class Ask(msgspec.Struct, frozen=True, gc=False):
    """One request as routing sees it.

    `prompt_tokens` is estimated from bytes; `answer_tokens` is the longest answer that the client wants, None if it
    doesn't say. `blocks` are chained hashes of what the prompt begins with, the first block first. `session` names the
    conversation that this is a turn of; None where it is none.
    """

    prompt_tokens: float = 0.0
    answer_tokens: int | None = None
    blocks: tuple[int, ...] = ()
    session: str | None = None


NOTHING_KNOWN = Ask()

# An estimate of a prompt's length may be so much too high.
SURELY = 0.7


def needed_tokens(ask: Ask) -> float:
    """How long a context the request surely needs: of its answer only what the client named."""
    return SURELY * ask.prompt_tokens + (ask.answer_tokens or 0)
