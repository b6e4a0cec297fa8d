"""Two variants of one parent on the same held-out text: which is nearer to the parent, paired by chat. Pure.

The difference of two figures has a much narrower interval than either: what makes a chat hard is the same for both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from config.estimates import Estimate, sign_flip_p, token_mean
from config.measurements import ChatMetrics, Measurements, TokenSums

Better = Literal["left", "right", "not shown"]


@dataclass(frozen=True, slots=True)
class FigureDifference:
    """A figure of the right variant minus that of the left, and which is nearer to the parent.

    `figure`: `kl_mean` and `excess_nll` (log of the perplexity ratio), in nats, or `top1_agreement`. `p_value` is that
    of "both are equally near".
    """

    figure: str
    difference: Estimate
    p_value: float
    better: Better


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """The differences on the generated tokens of the chats that both variants read."""

    chats: int
    tokens: int
    differences: tuple[FigureDifference, ...]


def compare_paired(left: Measurements, right: Measurements) -> PairedComparison | None:
    """Compare two variants by the chats that both were measured on; None if they share fewer than two.

    A chat is the same if its digest and its number of tokens are.
    """
    pairs = list(_shared(left.chats, right.chats))
    if len(pairs) < 2:
        return None
    counts = [before.tokens for before, _ in pairs]
    sums = {
        "kl_mean": [after.divergence - before.divergence for before, after in pairs],
        "top1_agreement": [float(after.agreed - before.agreed) for before, after in pairs],
        "excess_nll": [after.excess_nll - before.excess_nll for before, after in pairs],
    }
    differences = tuple(_difference(figure, values, counts) for figure, values in sums.items())
    return PairedComparison(len(pairs), sum(counts), differences)


def _difference(figure: str, sums: Sequence[float], counts: Sequence[int]) -> FigureDifference:
    found = token_mean(sums, counts)
    more: Better = "right" if figure == "top1_agreement" else "left"
    less: Better = "left" if more == "right" else "right"
    better: Better = more if found.low > 0 else less if found.high < 0 else "not shown"
    return FigureDifference(figure, found, sign_flip_p(sums), better)


def _shared(left: Sequence[ChatMetrics], right: Sequence[ChatMetrics]) -> Iterator[tuple[TokenSums, TokenSums]]:
    others = {(chat.chat, chat.generated.tokens): chat.generated for chat in right}
    for chat in left:
        other = others.get((chat.chat, chat.generated.tokens))
        if other is not None and other.tokens:
            yield chat.generated, other
