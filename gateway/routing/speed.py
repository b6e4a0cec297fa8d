"""How fast a replica answers: what was measured of its variant, and how far it was from that lately."""

from collections.abc import Sequence
from math import exp, inf
from typing import Self

import msgspec

from config.capacity import Measurement, Shape
from gateway.routing.engine_metrics import EngineMetrics

# Of the most that all requests get together; more at once only share it.
ENOUGH = 0.97
# Curves are tables by the number of requests; beyond the last entry all together get no more than there.
MOST_PLACES = 1024
DEFAULT_ANSWER_TOKENS = 256.0

# What was observed lately weighs: each first token a tenth of what is remembered, each look at an engine by its time.
FORGETS_SHARE = 0.1
FORGETS_SECONDS = 5.0
FURTHEST = 50.0
# Of a replica that nobody asks, the slowness is half forgotten after some 40 s: only requests can show that it is over.
RESTS_SECONDS = 60.0
# A first token costs a step, however short the prompt: shorter ones say nothing of how fast a replica reads.
SHORTEST_READING_TOKENS = 64.0


class SpeedProfile(msgspec.Struct, frozen=True, gc=False):
    """How fast replicas of a variant were measured to be; tables begin with one request at a time.

    `step_seconds` pass from token to token of one answer among so many, `together` is tokens a second of all answers.
    Reading takes a step, and `reading_seconds` for each token of the prompt. More than `slots` at once share what so
    many get; None: nobody measured how many that is.
    """

    step_seconds: tuple[float, ...]
    together: tuple[float, ...]
    reading_seconds: float
    slots: int | None
    answer_tokens: float = DEFAULT_ANSWER_TOKENS
    kv_capacity_tokens: int | None = None

    @classmethod
    def measured(cls, measurement: Measurement) -> Self | None:
        """Read a measurement; None if it leaves a speed out."""
        levels = range(1, min(measurement.loads[-1].concurrency, MOST_PLACES) + 1)
        answering = [measurement.decode_tokens_per_second(at_once) for at_once in levels]
        together = tuple([measurement.output_tokens_per_second(at_once) for at_once in levels])
        prefill_tokens_per_second = measurement.loads[0].prefill_tokens_per_second
        if min(prefill_tokens_per_second, *answering, *together) <= 0:
            return None
        prompt_tokens, answer_tokens = _means(measurement.mix)
        step_seconds = tuple([1 / rate for rate in answering])
        first_token_seconds = prompt_tokens / prefill_tokens_per_second
        # The first token takes a step of its own; what is left is reading.
        reading_seconds = max(first_token_seconds - step_seconds[0], first_token_seconds / 10) / prompt_tokens
        enough = ENOUGH * max(together)
        slots = next(at_once for at_once, rate in enumerate(together, 1) if rate >= enough)
        # Between two levels the line goes on rising where the engine already takes no more.
        slots = min(slots, measurement.setup.max_num_seqs or slots)
        return cls(step_seconds, together, reading_seconds, slots, answer_tokens, measurement.kv_capacity_tokens)

    def step_at(self, requests: float) -> float:
        """Seconds from token to token of one of so many requests."""
        known = len(self.step_seconds)
        if requests <= known:
            return self.step_seconds[max(int(requests) - 1, 0)]
        return requests / self.together[-1] if self.slots is not None else self.step_seconds[-1]

    def together_at(self, requests: float) -> float:
        """Tokens a second of all answers of so many requests."""
        known = len(self.together)
        if requests <= known:
            return self.together[max(int(requests) - 1, 0)]
        return self.together[-1] if self.slots is not None else requests / self.step_seconds[-1]


class Slowdown(msgspec.Struct, frozen=True, gc=False):
    """How much slower than measured a replica is: 1 is as measured, 5 takes five times as long.

    `expected` and `observed` are seconds until first tokens, of late.
    """

    answering: float = 1.0
    expected: float = 0.0
    observed: float = 0.0

    @property
    def reading(self) -> float:
        """How much slower it reads; where no first token was seen, as much slower as it answers."""
        if not self.expected:
            return self.answering
        return _bounded(self.observed / self.expected)


NO_SLOWDOWN = Slowdown()


def first_token(pace: Slowdown, expected_seconds: float, observed_seconds: float) -> Slowdown:
    """Note when a first token came, of a request that had not to wait for a place."""
    if expected_seconds <= 0:
        return pace
    if not pace.expected:
        # As if three had come as expected: one slow answer says little.
        pace = Slowdown(pace.answering, 3 * expected_seconds, 3 * expected_seconds)
    kept = 1 - FORGETS_SHARE
    expected, observed = kept * pace.expected + expected_seconds, kept * pace.observed + observed_seconds
    return Slowdown(pace.answering, expected, observed)


def answered(pace: Slowdown, expected_tokens: float, observed_tokens: float, seconds: float) -> Slowdown:
    """Note how many tokens an engine that was never idle gave in so many seconds, beside how many it should have."""
    if expected_tokens <= 0 or seconds <= 0:
        return pace
    slower = _bounded(expected_tokens / max(observed_tokens, expected_tokens / FURTHEST))
    share = 1 - exp(-seconds / FORGETS_SECONDS)
    # A mean of logarithms: half as fast and twice as fast are equally far.
    answering = pace.answering ** (1 - share) * slower**share
    return Slowdown(_bounded(answering), pace.expected, pace.observed)


def rested(pace: Slowdown, seconds: float) -> Slowdown:
    """Believe the measurement again, little by little, of a replica that had nothing to do for so long."""
    if pace is NO_SLOWDOWN:
        return pace
    left = exp(-seconds / RESTS_SECONDS)
    observed = pace.expected * (pace.observed / pace.expected) ** left if pace.expected else 0.0
    return Slowdown(pace.answering**left, pace.expected, observed)


class Estimate(msgspec.Struct, frozen=True, gc=False):
    """What was observed of a replica of a variant that nobody measured; zero is nothing yet.

    `read_seconds` passed until first tokens, of late, and `read_tokens` were read in them.
    """

    step_seconds: float = 0.0
    read_seconds: float = 0.0
    read_tokens: float = 0.0

    @property
    def reading_seconds(self) -> float:
        """Seconds for each token of a prompt: of sums, for which long prompts count for more than short ones."""
        return self.read_seconds / self.read_tokens if self.read_tokens else 0.0

    def speed(self, answer_tokens: float) -> SpeedProfile | None:
        """As a speed without a limit to how many it answers at once; None as long as either is unknown."""
        if not self.step_seconds or not self.reading_seconds:
            return None
        return SpeedProfile((self.step_seconds,), (1 / self.step_seconds,), self.reading_seconds, None, answer_tokens)


NO_ESTIMATE = Estimate()


def estimate_first_token(learnt: Estimate, observed_seconds: float, prompt_tokens: float) -> Estimate:
    """Note when a first token came."""
    kept, tokens = 1 - FORGETS_SHARE, max(prompt_tokens, SHORTEST_READING_TOKENS)
    return Estimate(
        learnt.step_seconds, kept * learnt.read_seconds + observed_seconds, kept * learnt.read_tokens + tokens
    )


def estimate_answering(learnt: Estimate, requests: float, tokens: float, seconds: float) -> Estimate:
    """Note how many tokens so many requests were given in so many seconds."""
    if tokens <= 0 or requests <= 0 or seconds <= 0:
        return learnt
    share = 1 - exp(-seconds / FORGETS_SECONDS)
    step_seconds = _blended(learnt.step_seconds, requests * seconds / tokens, share)
    return Estimate(step_seconds, learnt.read_seconds, learnt.read_tokens)


def estimate_rested(learnt: Estimate, usual: Estimate, seconds: float) -> Estimate:
    """Believe of a replica that had nothing to do for so long that it is no slower than usual among its like."""
    share = 1 - exp(-seconds / RESTS_SECONDS)
    step_seconds = _nearer(learnt.step_seconds, usual.step_seconds, share)
    reading_seconds = _nearer(learnt.reading_seconds, usual.reading_seconds, share)
    return Estimate(step_seconds, reading_seconds * learnt.read_tokens, learnt.read_tokens)


def observed_slots(known: float, before: EngineMetrics | None, poll: EngineMetrics) -> float:
    """How many requests an engine takes: the most that it ran since it has a queue; inf: it has none.

    Fewer run for a moment whenever answers end together, so that it comes down slowly. How many found a place earlier
    says little: that goes by how long they were.
    """
    if before is None or not before.waiting or not poll.waiting or before.running is None or poll.running is None:
        return inf
    most = max(poll.running, before.running, 1.0)
    if most > known or known == inf:
        return most
    return _blended(known, most, 1 - exp(-max(poll.at_seconds - before.at_seconds, 0.0) / FORGETS_SECONDS))


def _means(mix: Sequence[Shape]) -> tuple[float, float]:
    """Tokens of a prompt and of an answer, on average."""
    shares = sum(shape.share for shape in mix)
    prompt = sum(shape.prompt_tokens * shape.share for shape in mix)
    return prompt / shares, sum(shape.answer_tokens * shape.share for shape in mix) / shares


def _blended(old: float, new: float, share: float) -> float:
    return (1 - share) * old + share * new if old else new


def _nearer(own: float, usual: float, share: float) -> float:
    return (1 - share) * own + share * usual if 0 < usual < own else own


def _bounded(slower: float) -> float:
    return min(max(slower, 1 / FURTHEST), FURTHEST)
