"""Which replicas can take a request of some length at all."""

from serving.replica import Replica

# How much longer than the prompt its estimate may be.
ESTIMATE_OVER = 1.3


def fits(replica: Replica, prompt_tokens: float, answer_tokens: int | None) -> bool:
    """Tell whether a prompt may fit; False only if it surely doesn't, however far off its estimate is.

    vLLM refuses a prompt that leaves no room for one more token, or for the answer that was asked for: all of
    `answer_tokens`, where the client named it. A context of unknown length takes everything.
    """
    length_tokens = replica.max_model_len_tokens
    return length_tokens is None or prompt_tokens / ESTIMATE_OVER + (answer_tokens or 1) <= length_tokens
