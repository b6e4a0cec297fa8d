"""The KL of one row over that of another on the same chats, with its interval by chat. Pure.

What makes a chat hard is the same for both rows: the interval is much narrower than those of the two figures suggest.
"""

import math
import random
from collections.abc import Sequence

from config.estimates import Estimate
from config.measurements import ChatMetrics

_DRAWS = 2999
_TAIL = 0.025
# Relative error below which the ratio is the same in all chats.
_NO_ERROR = 1e-12


def kl_ratio(ours: Sequence[ChatMetrics], theirs: Sequence[ChatMetrics]) -> Estimate:
    """Estimate ours over theirs, a ratio of sums over the generated tokens; ValueError if the chats are not the same.

    The interval is the bootstrap-t of Efron and Tibshirani (1993, An Introduction to the Bootstrap, 12.5): chats are
    drawn again, and each draw's error is in units of its own standard error. For 30 chats its coverage is nearer to
    95 % than that of plain percentiles. The draws are the same in each call.
    """
    if [(chat.chat, chat.generated.tokens) for chat in ours] != [(chat.chat, chat.generated.tokens) for chat in theirs]:
        raise ValueError("rows that were measured on different chats can't be compared")
    pairs = [(one.generated.divergence, other.generated.divergence) for one, other in zip(ours, theirs, strict=True)]
    ratio, error = _ratio(pairs)
    if not error:
        return Estimate(ratio, ratio, ratio, len(pairs))
    draw = random.Random(0)
    again = (_ratio(draw.choices(pairs, k=len(pairs))) for _ in range(_DRAWS))
    studentized = sorted((drawn - ratio) / its_error for drawn, its_error in again if its_error)
    most, least = studentized[-1 - int(_TAIL * len(studentized))], studentized[int(_TAIL * len(studentized))]
    return Estimate(ratio, max(ratio - most * error, 0.0), ratio - least * error, len(pairs))


def _ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Give a ratio of sums and its linearized standard error, 0 where all pairs have one ratio."""
    total = sum(other for _, other in pairs)
    ratio = sum(one for one, _ in pairs) / total
    squares = sum((one - ratio * other) ** 2 for one, other in pairs)
    error = math.sqrt(squares * len(pairs) / max(len(pairs) - 1, 1)) / total
    return ratio, error if error > _NO_ERROR * abs(ratio) else 0.0
