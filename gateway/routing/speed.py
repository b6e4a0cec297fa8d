"""The speed of replicas: the measured profile of a variant, and a replica's recent deviation from it."""

from collections.abc import Sequence
from math import exp, inf
from typing import Self

import msgspec

from config.capacity import Measurement, Shape
from gateway.routing.engine_metrics import EngineMetrics

# The engine is saturated at this share of its maximum throughput: more requests at once only share it.
SATURATION_SHARE = 0.97
# The largest concurrency in the tables of a profile; beyond it, the throughput is that of the last entry.
MAX_TABLE_CONCURRENCY = 1024
DEFAULT_ANSWER_TOKENS = 256.0

# Observations decay exponentially: those of first tokens by a share per first token, rates with a time constant.
FIRST_TOKEN_DECAY = 0.1
DECAY_SECONDS = 5.0
# Slowdowns are between 1 / MAX_SLOWDOWN and MAX_SLOWDOWN.
MAX_SLOWDOWN = 50.0
# Time constant with which an idle replica returns to its measured speed (half-life about 40 s): without requests,
# nothing can show that a slowdown is over.
IDLE_DECAY_SECONDS = 60.0
# A first token takes a decode step even if the prompt is short, so shorter prompts count with this length.
MIN_PROMPT_TOKENS = 64.0


class SpeedProfile(msgspec.Struct, frozen=True, gc=False):
    """The measured speed of a variant's replicas. The tables are by concurrency, from one request on.

    `step_seconds` is the time per output token of one answer, `together` the output tokens per second of all answers.
    Prefill takes one step, and `reading_seconds` per token of the prompt. Above `slots` requests the throughput does
    not grow; None if it was not measured.
    """

    step_seconds: tuple[float, ...]
    together: tuple[float, ...]
    reading_seconds: float
    slots: int | None
    answer_tokens: float = DEFAULT_ANSWER_TOKENS
    kv_capacity_tokens: int | None = None

    @classmethod
    def measured(cls, measurement: Measurement) -> Self | None:
        """Build a profile from a measurement; None if one of its rates is zero."""
        levels = range(1, min(measurement.loads[-1].concurrency, MAX_TABLE_CONCURRENCY) + 1)
        decode_rates = [measurement.decode_tokens_per_second(concurrency) for concurrency in levels]
        together = tuple([measurement.output_tokens_per_second(concurrency) for concurrency in levels])
        prefill_tokens_per_second = measurement.loads[0].prefill_tokens_per_second
        if min(prefill_tokens_per_second, *decode_rates, *together) <= 0:
            return None
        prompt_tokens, answer_tokens = _means(measurement.mix)
        step_seconds = tuple([1 / rate for rate in decode_rates])
        first_token_seconds = prompt_tokens / prefill_tokens_per_second
        # The first token takes one decode step; the rest of the time is prefill.
        reading_seconds = max(first_token_seconds - step_seconds[0], first_token_seconds / 10) / prompt_tokens
        saturated = SATURATION_SHARE * max(together)
        slots = next(concurrency for concurrency, rate in enumerate(together, 1) if rate >= saturated)
        # Rates between two measured levels are interpolated, so they rise beyond the engine's own limit.
        slots = min(slots, measurement.setup.max_num_seqs or slots)
        return cls(step_seconds, together, reading_seconds, slots, answer_tokens, measurement.kv_capacity_tokens)

    def step_at(self, requests: float) -> float:
        """Seconds per output token of one of `requests` concurrent requests."""
        known = len(self.step_seconds)
        if requests <= known:
            return self.step_seconds[max(int(requests) - 1, 0)]
        return requests / self.together[-1] if self.slots is not None else self.step_seconds[-1]

    def together_at(self, requests: float) -> float:
        """Output tokens per second of all answers of `requests` concurrent requests."""
        known = len(self.together)
        if requests <= known:
            return self.together[max(int(requests) - 1, 0)]
        return self.together[-1] if self.slots is not None else requests / self.step_seconds[-1]


class Slowdown(msgspec.Struct, frozen=True, gc=False):
    """The slowdown of a replica relative to its profile: 1 is as measured, 5 takes five times as long.

    `answering` is that of decoding. `expected` and `observed` are decaying sums of seconds until first tokens.
    """

    answering: float = 1.0
    expected: float = 0.0
    observed: float = 0.0

    @property
    def reading(self) -> float:
        """The slowdown of prefill; without any first token, that of decoding."""
        if not self.expected:
            return self.answering
        return _bounded(self.observed / self.expected)


NO_SLOWDOWN = Slowdown()


def first_token(slowdown: Slowdown, expected_seconds: float, observed_seconds: float) -> Slowdown:
    """Add the time until the first token of a request that did not have to queue in the engine."""
    if expected_seconds <= 0:
        return slowdown
    if not slowdown.expected:
        # Start as if three first tokens had come as expected: a single slow one is weak evidence.
        slowdown = Slowdown(slowdown.answering, 3 * expected_seconds, 3 * expected_seconds)
    decay = 1 - FIRST_TOKEN_DECAY
    expected, observed = decay * slowdown.expected + expected_seconds, decay * slowdown.observed + observed_seconds
    return Slowdown(slowdown.answering, expected, observed)


def answered(slowdown: Slowdown, expected_tokens: float, observed_tokens: float, seconds: float) -> Slowdown:
    """Add the expected and observed output tokens of an engine that was busy for the whole of `seconds`."""
    if expected_tokens <= 0 or seconds <= 0:
        return slowdown
    ratio = _bounded(expected_tokens / max(observed_tokens, expected_tokens / MAX_SLOWDOWN))
    share = 1 - exp(-seconds / DECAY_SECONDS)
    # A geometric mean: half as fast and twice as fast deviate equally.
    answering = slowdown.answering ** (1 - share) * ratio**share
    return Slowdown(_bounded(answering), slowdown.expected, slowdown.observed)


def rested(slowdown: Slowdown, seconds: float) -> Slowdown:
    """Let the slowdown of a replica that was idle for `seconds` decay towards 1."""
    if slowdown is NO_SLOWDOWN:
        return slowdown
    exponent = exp(-seconds / IDLE_DECAY_SECONDS)
    expected = slowdown.expected
    observed = expected * (slowdown.observed / expected) ** exponent if expected else 0.0
    return Slowdown(slowdown.answering**exponent, expected, observed)


class Estimate(msgspec.Struct, frozen=True, gc=False):
    """The observed speed of a replica whose variant has no measurement; 0 means not observed.

    `step_seconds` is the time per output token of one answer. `read_seconds` and `read_tokens` are decaying sums: the
    time until first tokens, and the prompt tokens processed in it.
    """

    step_seconds: float = 0.0
    read_seconds: float = 0.0
    read_tokens: float = 0.0

    @property
    def reading_seconds(self) -> float:
        """Prefill seconds per prompt token; a ratio of sums, so long prompts have more weight."""
        return self.read_seconds / self.read_tokens if self.read_tokens else 0.0

    def speed(self, answer_tokens: float) -> SpeedProfile | None:
        """A profile with unknown slots; None until both speeds have been observed."""
        if not self.step_seconds or not self.reading_seconds:
            return None
        return SpeedProfile((self.step_seconds,), (1 / self.step_seconds,), self.reading_seconds, None, answer_tokens)


NO_ESTIMATE = Estimate()


def estimate_first_token(estimate: Estimate, observed_seconds: float, prompt_tokens: float) -> Estimate:
    """Add the time until a first token."""
    decay, tokens = 1 - FIRST_TOKEN_DECAY, max(prompt_tokens, MIN_PROMPT_TOKENS)
    return Estimate(
        estimate.step_seconds, decay * estimate.read_seconds + observed_seconds, decay * estimate.read_tokens + tokens
    )


def estimate_answering(estimate: Estimate, requests: float, tokens: float, seconds: float) -> Estimate:
    """Add the output tokens that `requests` concurrent requests received in `seconds`."""
    if tokens <= 0 or requests <= 0 or seconds <= 0:
        return estimate
    share = 1 - exp(-seconds / DECAY_SECONDS)
    step_seconds = _blended(estimate.step_seconds, requests * seconds / tokens, share)
    return Estimate(step_seconds, estimate.read_seconds, estimate.read_tokens)


def estimate_rested(estimate: Estimate, usual: Estimate, seconds: float) -> Estimate:
    """Move the estimate of a replica that was idle for `seconds` towards `usual`, the variant's, if that is faster."""
    share = 1 - exp(-seconds / IDLE_DECAY_SECONDS)
    step_seconds = _nearer(estimate.step_seconds, usual.step_seconds, share)
    reading_seconds = _nearer(estimate.reading_seconds, usual.reading_seconds, share)
    return Estimate(step_seconds, reading_seconds * estimate.read_tokens, estimate.read_tokens)


def observed_slots(slots: float, before: EngineMetrics | None, poll: EngineMetrics) -> float:
    """Update the observed concurrency limit: the most requests that ran at once while others waited; inf if none wait.

    When answers end together, few requests run for a moment, so the limit falls slowly. It starts anew with each queue,
    because it depends on the lengths of the requests. Polls between which no token was generated show nothing: both may
    lie within the reading of one long prompt, during which others wait although the engine has room for them.
    """
    if before is None or not before.waiting or not poll.waiting or before.running is None or poll.running is None:
        return inf
    if before.generated_tokens is not None and before.generated_tokens == poll.generated_tokens:
        return slots
    running = max(poll.running, before.running, 1.0)
    if running > slots or slots == inf:
        return running
    return _blended(slots, running, 1 - exp(-max(poll.at_seconds - before.at_seconds, 0.0) / DECAY_SECONDS))


def _means(mix: Sequence[Shape]) -> tuple[float, float]:
    """The mean number of prompt tokens and of answer tokens."""
    shares = sum(shape.share for shape in mix)
    prompt_tokens = sum(shape.prompt_tokens * shape.share for shape in mix)
    return prompt_tokens / shares, sum(shape.answer_tokens * shape.share for shape in mix) / shares


def _blended(old: float, new: float, share: float) -> float:
    """The weighted mean; `new` if there is no old value."""
    return (1 - share) * old + share * new if old else new


def _nearer(own: float, usual: float, share: float) -> float:
    """The weighted mean if the usual value is known and smaller, otherwise the own one."""
    return (1 - share) * own + share * usual if 0 < usual < own else own


def _bounded(slowdown: float) -> float:
    return min(max(slowdown, 1 / MAX_SLOWDOWN), MAX_SLOWDOWN)
