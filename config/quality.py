"""Measured quality of a variant relative to its parent, as its manifest has it: figures, intervals, checks, verdict."""

import math
from typing import Literal

from pydantic import Field, model_validator

from config.record import Record

Verdict = Literal["pass", "fail", "not shown"]


class Interval(Record):
    """95 % interval of a figure; None where it has no end."""

    low: float | None
    high: float | None


class Check(Record):
    """One quality limit, and what the figure with its interval says about it.

    `passed` is true for the verdict "pass" alone. "not shown": the limit lies inside the interval; `more_chats` says
    how many more chats (prompts, questions) should decide it, None where no number would.
    """

    name: str
    value: float
    limit: float
    passed: bool
    interval: Interval | None = None
    verdict: Verdict = "pass"
    more_chats: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_verdict(cls, value: object) -> object:
        """Give a check without a verdict the one that `passed` says: manifests had no third verdict before."""
        if isinstance(value, dict) and "verdict" not in value and "passed" in value:
            return {**value, "verdict": "pass" if value["passed"] else "fail"}
        return value


class Restricted(Record):
    """Quality on a subset of the tokens: prompts, reasoning or answers."""

    tokens: int
    kl_mean: float
    top1_agreement: float
    perplexity_ratio: float


class Generation(Record):
    """Paired generations of parent and variant: `prompts` prompts with `seeds` seeds each, up to `new_tokens` tokens.

    Rates are fractions of all generations: `unfinished` reached `new_tokens`, `repeating` ended in repeated tokens,
    `unclosed` left a <think> open. `length_ratio` is the variant's length over the parent's.
    """

    prompts: int
    seeds: int
    new_tokens: int
    length_ratio: float
    unfinished: float
    parent_unfinished: float
    repeating: float
    parent_repeating: float
    unclosed: float
    parent_unclosed: float


class Tasks(Record):
    """Accuracy of parent and variant on questions with known answers.

    `recovery` is the variant's accuracy divided by the parent's; `flips` the fraction of items whose correctness
    differs.
    """

    dataset_sha256: str
    items: int
    parent_accuracy: float
    accuracy: float
    recovery: float
    flips: float


class Quality(Record):
    """Quality relative to the parent, measured with teacher forcing on held-out text.

    `tokens` are the generated ones of `chats` samples (0: unknown), reasoning and answers; those of their `prompt` are
    reported beside them. `intervals` are by figure. `longest_position` is the last position that was compared.
    `kl_floor` is the mean divergence of the parent from itself, read in another way by the same engine. `method` names
    what computed the probabilities; with `top_k`, all but the likeliest tokens were lumped.
    """

    dataset_sha256: str
    tokens: int
    chats: int = 0
    method: str = ""
    top_k: int | None = None
    longest_position: int | None = None
    kl_floor: float | None = None
    intervals: dict[str, Interval] = Field(default_factory=dict)
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    perplexity_ratio: float
    length_ratio: float | None = None
    prompt: Restricted | None = None
    reasoning: Restricted | None = None
    answer: Restricted | None = None
    generation: Generation | None = None
    tasks: Tasks | None = None
    checks: tuple[Check, ...] = ()
    verdict: Verdict

    def bound(self, figure: str, *, upper: bool) -> float | None:
        """Return the upper or lower end of a figure's interval, or the figure itself if it has no interval.

        None for a figure that was not measured; infinite where the interval has no end.
        """
        value: float | None = getattr(self, figure)
        interval = self.intervals.get(figure)
        if value is None or interval is None:
            return value
        end = interval.high if upper else interval.low
        return end if end is not None else (math.inf if upper else -math.inf)
