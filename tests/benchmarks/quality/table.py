"""Results of contenders -> the table of RESULTS.md. Pure."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from config.estimates import Estimate

_HEAD = (
    "| contender | bits per weight: layers, file | mean KL | top-1 | perplexity | seconds |",
    "| --- | --- | --- | --- | --- | --- |",
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
    """One contender's row, kept in the work folder; `failure` says why there are no figures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contender: str
    seconds: float = 0.0
    layer_bits: float = 0.0
    file_bits: float = 0.0
    tokens: int = 0
    chats: int = 0
    kl_mean: Figure | None = None
    top1_agreement: Figure | None = None
    perplexity_ratio: Figure | None = None
    failure: str = ""


def table(results: Sequence[Result]) -> str:
    """Write all rows as Markdown, in the order given."""
    return "\n".join([*_HEAD, *map(row, results)])


def row(result: Result) -> str:
    """Write one row: figures with their intervals, or why there are none."""
    kl, top1, ratio = result.kl_mean, result.top1_agreement, result.perplexity_ratio
    if kl is None or top1 is None or ratio is None:
        return f"| {result.contender} | | {result.failure} | | | |"
    return (
        f"| {result.contender} | {result.layer_bits:.2f}, {result.file_bits:.2f} "
        f"| {kl.value:.4f} ({kl.low:.4f} to {kl.high:.4f}) "
        f"| {top1.value:.1%} ({top1.low:.1%} to {top1.high:.1%}) "
        f"| x{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) | {result.seconds:.0f} |"
    )
