"""Two models' logits over the same tokens -> how far apart they are, token by token, and sums of them.

The vocabulary is read in slices with running sums, so that no softmax over it ever exists as a whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from config.measurements import TokenSums

# Entries of the vocabulary at a time: 512 positions of it are 8 MB, which fits a CPU's cache.
VOCABULARY_SLICE = 4096

# (first, last) of a slice of the vocabulary -> fp32 logits [T, last - first] of that slice.
Logits = Callable[[int, int], Any]


@dataclass(frozen=True, slots=True)
class TokenMetrics:
    """Per predicted token, each a tensor [T]: KL(parent||variant) in nats, both likelihoods, equal first choices."""

    divergence: Any
    nll_parent: Any
    nll_variant: Any
    agreed: Any


@dataclass(slots=True)
class _Softmax:
    """Running sums of one model's softmax over the slices of the vocabulary so far, each [T]."""

    largest: Any
    total: Any
    chosen: Any
    target_logit: Any

    @property
    def log_total(self) -> Any:
        """Log of the sum of all exponentials, [T] fp64."""
        return self.largest.double() + self.total.log()

    def rescaled(self, slice_logits: Any, first: int) -> Any:
        """Take in a slice's maxima; gives the factor [T] by which earlier sums shrink."""
        values, places = slice_logits.max(dim=-1)
        larger = values > self.largest
        self.chosen = self.chosen.where(~larger, places + first)
        before, self.largest = self.largest, values.maximum(self.largest)
        return (before - self.largest).double().exp()

    def take_targets(self, slice_logits: Any, first: int, targets: Any) -> None:
        """Remember the logits of the tokens that came, where they lie in this slice."""
        inside = (targets >= first) & (targets < first + slice_logits.shape[-1])
        index = (targets - first).clamp(0, slice_logits.shape[-1] - 1).unsqueeze(-1)
        self.target_logit = self.target_logit.where(~inside, slice_logits.gather(-1, index).squeeze(-1))


def compare(parent: Logits, variant: Logits, targets: Any, vocabulary: int) -> TokenMetrics:
    """Hold two models' predictions of `targets` [T] against each other; never more than a few slices in memory.

    With a, b the logits: KL = sum(softmax(a) * (a - b)) - (log_total(a) - log_total(b)).
    """
    import torch  # noqa: PLC0415

    ours, theirs = _empty(targets), _empty(targets)
    weighted = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
    for first in range(0, vocabulary, VOCABULARY_SLICE):
        last = min(first + VOCABULARY_SLICE, vocabulary)
        a, b = parent(first, last), variant(first, last)
        shrink_a, shrink_b = ours.rescaled(a, first), theirs.rescaled(b, first)
        ours.take_targets(a, first, targets)
        theirs.take_targets(b, first, targets)
        share = (a - ours.largest.unsqueeze(-1)).exp_()
        ours.total = ours.total * shrink_a + share.sum(-1, dtype=torch.float64)
        # A token that the parent rules out (-inf) counts nothing, whatever the variant thinks of it.
        gap = a.sub_(b).masked_fill_(share == 0, 0)
        weighted = weighted * shrink_a + gap.mul_(share).sum(-1, dtype=torch.float64)
        theirs.total = theirs.total * shrink_b + b.sub_(theirs.largest.unsqueeze(-1)).exp_().sum(
            -1, dtype=torch.float64
        )
    divergence = weighted / ours.total - (ours.log_total - theirs.log_total)
    return TokenMetrics(
        divergence=divergence.clamp(min=0),
        nll_parent=ours.log_total - ours.target_logit.double(),
        nll_variant=theirs.log_total - theirs.target_logit.double(),
        agreed=ours.chosen == theirs.chosen,
    )


def joined(parts: Sequence[TokenMetrics]) -> TokenMetrics:
    """Put the distances of several stretches of text one behind the other, on the CPU."""
    import torch  # noqa: PLC0415

    def joint(name: str) -> Any:
        return torch.cat([getattr(part, name).cpu() for part in parts])

    return TokenMetrics(joint("divergence"), joint("nll_parent"), joint("nll_variant"), joint("agreed"))


def token_sums(metrics: TokenMetrics, flags: Any) -> TokenSums:
    """Sum up the tokens whose flag [T] is set."""
    tokens = int(flags.sum())
    return TokenSums(
        tokens=tokens,
        divergence=float(metrics.divergence[flags].sum()),
        excess_nll=float((metrics.nll_variant - metrics.nll_parent)[flags].sum()),
        agreed=int(metrics.agreed[flags].sum()),
    )


def percentile(sorted_values: Any, share: float) -> float:
    """The value [T] that `share` of all values don't exceed."""
    return float(sorted_values[int(share * (len(sorted_values) - 1))])


def _empty(targets: Any) -> _Softmax:
    import torch  # noqa: PLC0415

    zeros = torch.zeros(len(targets), device=targets.device)
    return _Softmax(
        largest=zeros + torch.finfo(zeros.dtype).min,
        total=zeros.double(),
        chosen=torch.zeros_like(targets),
        target_logit=zeros.clone(),
    )
