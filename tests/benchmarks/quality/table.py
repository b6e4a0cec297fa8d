"""Results of contenders -> the table of RESULTS.md. Pure."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from config.estimates import Estimate
from config.measurements import ChatMetrics
from tests.benchmarks.quality.paired import kl_ratio

_HEAD = (
    "| contender | bits per weight: layers, file | mean KL | KL of ours over it | top-1 | perplexity | seconds |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)


class Figure(BaseModel):
    """An estimate with its 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, estimate: Estimate) -> "Figure":
        """Keep an estimate."""
        return cls(value=estimate.value, low=estimate.low, high=estimate.high)


class Result(BaseModel):
    """One contender's row, kept in the work folder; `failure` says why there are no figures.

    `measured` are the chats one by one, by which rows are compared; `against` is the row of ours to compare with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    contender: str
    seconds: float = 0.0
    layer_bits: float = 0.0
    file_bits: float = 0.0
    against: str = ""
    measured: tuple[ChatMetrics, ...] = ()
    kl_mean: Figure | None = None
    top1_agreement: Figure | None = None
    perplexity_ratio: Figure | None = None
    failure: str = ""


def table(results: Sequence[Result], kept: Sequence[Result] = ()) -> str:
    """Write all rows as Markdown, in the order given; those of ours to compare with can be among the kept ones."""
    named = {result.contender: result for result in (*kept, *results)}
    return "\n".join([*_HEAD, *(row(result, ratio_to(named, result)) for result in results)])


def ratio_to(named: Mapping[str, Result], result: Result) -> Figure | None:
    """Compare a row with that of ours which it names; None where there is none, or it has no chats."""
    ours = named.get(result.against)
    return Figure.of(kl_ratio(ours.measured, result.measured)) if ours and ours.measured and result.measured else None


def row(result: Result, ratio: Figure | None = None) -> str:
    """Write one row: figures with their intervals, or why there are none."""
    kl, top1, perplexity = result.kl_mean, result.top1_agreement, result.perplexity_ratio
    if kl is None or top1 is None or perplexity is None:
        return f"| {result.contender} | | {result.failure} | | | | |"
    compared = f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else ""
    return (
        f"| {result.contender} | {result.layer_bits:.2f}, {result.file_bits:.2f} "
        f"| {kl.value:.4f} ({kl.low:.4f} to {kl.high:.4f}) | {compared} "
        f"| {top1.value:.1%} ({top1.low:.1%} to {top1.high:.1%}) "
        f"| x{perplexity.value:.3f} ({perplexity.low:.3f} to {perplexity.high:.3f}) | {result.seconds:.0f} |"
    )
