"""Shadowing by teacher forcing: an answer of the old variant is scored on the new one, and on the old one again.

The tokens of a sampled answer are prompts with `prompt_logprobs`: no sampling, no judge, nothing shown to anybody. What
counts is the mean difference of log-probabilities per token (an estimate of the divergence from the old variant), and
how often the new variant would have chosen the same token.

Scoring costs a prefill and, in vLLM's V1 runner, memory of tokens x vocabulary that its profiling does not see
(vllm#5907). So one answer at a time is scored per process, of at most MAX_TOKENS, on replicas whose engines are idle,
never while the alias spills; and the death of an engine ends it.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from serving.defects import logged_defects
from serving.errors import ProbeFailed
from serving.replica import Replica

log = logging.getLogger(__name__)

MAX_TOKENS = 2048
# Shorter answers say little, and cost a prefill all the same.
MIN_ANSWER_TOKENS = 4


class ScoredToken(NamedTuple):
    """What a variant thinks of a token: its log-probability, and its place among all tokens, from 1."""

    logprob: float
    rank: int


class Sample(NamedTuple):
    """An answer to score: the messages before it, as JSON, and its text."""

    messages: bytes
    text: str


class Agreement(NamedTuple):
    """How two variants compare on one answer: mean log p(old) - log p(new) per token, and shares of first choices."""

    difference: float
    agreement: float
    old_agreement: float


class Scorer(Protocol):
    """Asks a replica for what is needed; `serving.probe.Probe` does."""

    async def requests_in_engine(self, replica: Replica) -> int | None:
        """Requests of a replica from all senders; None if unknown."""

    async def chat_tokens(self, replica: Replica, messages: Any) -> list[int]:
        """Tokens of a chat's prompt."""

    async def token_ids(self, replica: Replica, text: str) -> tuple[int, ...]:
        """Tokens of a text."""

    async def scored_tokens(self, replica: Replica, ids: Sequence[int]) -> list[tuple[float, int]]:
        """Log-probability and rank of each token but the first."""


class Sampling:
    """Takes a share of answers, exactly: by error accumulation, not at random."""

    __slots__ = ("_owed", "share")

    def __init__(self, share: float) -> None:
        self.share = share
        self._owed = 0.0

    def take(self) -> bool:
        """Return whether to take this one."""
        self._owed += self.share
        if self._owed < 1:
            return False
        self._owed -= 1
        return True


class Shadow:
    """Scores sampled answers from `start` to `stop`; `report` gets each result.

    `replicas` returns a ready replica of the new variant and one of the old one, or None; `is_spilling` whether the
    alias spills now. `ended` is why it has ended, empty while it goes on.
    """

    def __init__(
        self,
        scorer: Scorer,
        replicas: Callable[[], tuple[Replica, Replica] | None],
        is_spilling: Callable[[], bool],
        is_ready: Callable[[Replica], bool],
        report: Callable[[Agreement], None],
    ) -> None:
        self.ended = ""
        self._scorer = scorer
        self._replicas = replicas
        self._is_spilling = is_spilling
        self._is_ready = is_ready
        self._report = report
        self._waiting: Sample | None = None
        self._offered = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to score."""
        self._task = asyncio.create_task(self._score_regularly(), name="shadow")

    def stop(self) -> None:
        """Score no more."""
        if self._task is not None:
            self._task.cancel()

    def offer(self, sample: Sample) -> None:
        """Have an answer scored, unless one waits already."""
        if self._waiting is None and not self.ended:
            self._waiting = sample
            self._offered.set()

    async def score(self, sample: Sample) -> Agreement | None:
        """Score an answer; None if it does not fit, or if the replicas have something else to do."""
        pair = self._replicas()
        if pair is None or self._is_spilling():
            return None
        new, old = pair
        if any([await self._scorer.requests_in_engine(replica) != 0 for replica in pair]):
            return None
        prompt = await self._scorer.chat_tokens(new, msgspec.json.decode(sample.messages))
        answer = await self._scorer.token_ids(new, sample.text)
        if len(answer) < MIN_ANSWER_TOKENS or len(prompt) + len(answer) > MAX_TOKENS:
            return None
        ids = [*prompt, *answer]
        scored = [await self._scorer.scored_tokens(replica, ids) for replica in (new, old)]
        return compare(*[[ScoredToken(*token) for token in tokens[-len(answer) :]] for tokens in scored])

    async def _score_regularly(self) -> None:
        while not self.ended:
            await self._offered.wait()
            self._offered.clear()
            sample = self._waiting
            if sample is None:
                continue
            with logged_defects("scoring answers"):
                await self._score_and_report(sample)
            self._waiting = None

    async def _score_and_report(self, sample: Sample) -> None:
        pair = self._replicas()
        try:
            result = await self.score(sample)
        except ProbeFailed as error:
            log.info("an answer could not be scored: %s", error)
            self._end_if_dead(pair, error)
        else:
            if result is not None:
                self._report(result)

    def _end_if_dead(self, pair: tuple[Replica, Replica] | None, error: ProbeFailed) -> None:
        """The breaker: an engine that fails while it scores ends shadowing; a refusal (4xx) does not."""
        refused = any(f"answered {code}" in str(error) for code in (400, 404, 422))
        if not refused or any(not self._is_ready(replica) for replica in pair or ()):
            self.ended = f"shadowing has ended: {error}"
            log.error("%s", self.ended)


def compare(new: Sequence[ScoredToken], old: Sequence[ScoredToken]) -> Agreement | None:
    """Compare the scores of an answer's tokens; None without tokens."""
    if not new or len(new) != len(old):
        return None
    count = len(new)
    difference = sum(theirs.logprob - ours.logprob for ours, theirs in zip(new, old, strict=True)) / count
    agreement = sum(token.rank == 1 for token in new) / count
    return Agreement(difference, agreement, sum(token.rank == 1 for token in old) / count)
