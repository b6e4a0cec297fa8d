"""The speed of a replica: as measured, and as observed since."""

from math import exp, inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.capacity import Shape
from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.speed import (
    MAX_SLOWDOWN,
    NO_ESTIMATE,
    NO_SLOWDOWN,
    SpeedProfile,
    answered,
    estimate_answering,
    estimate_first_token,
    first_token,
    observed_slots,
)
from tests.config.measurements import load, measurement

MEASURED = measurement(
    load(1, decode_tokens_per_second=40.0, output_tokens_per_second=36.0, prefill_tokens_per_second=200.0),
    load(4, decode_tokens_per_second=30.0, output_tokens_per_second=100.0),
    load(8, decode_tokens_per_second=15.0, output_tokens_per_second=102.0),
    mix=(Shape(prompt_tokens=20, answer_tokens=32, share=0.5), Shape(prompt_tokens=60, answer_tokens=96, share=0.5)),
)


def known() -> SpeedProfile:
    """The profile of the measurement above."""
    speed = SpeedProfile.measured(MEASURED)
    assert speed is not None
    return speed


def test_a_profile_of_a_measurement() -> None:
    """Steps and rates are tables by concurrency; slots end where the rate hardly grows; reading excludes a step."""
    speed = known()
    assert len(speed.step_seconds) == len(speed.together) == 8
    assert speed.step_seconds[0] == pytest.approx(1 / 40)
    assert speed.step_seconds[3] == pytest.approx(1 / 30)
    assert speed.together[3] == pytest.approx(100)
    assert speed.slots == 4
    assert speed.answer_tokens == 64
    # 40 tokens at 200 per second take 0.2 s, of which one step is that of the first token.
    assert speed.reading_seconds == pytest.approx((40 / 200 - 1 / 40) / 40)


@pytest.mark.parametrize(
    "requests, step, together",
    [
        (0, 1 / 40, 36),
        (1, 1 / 40, 36),
        (4, 1 / 30, 100),
        (8, 1 / 15, 102),
        (16, 16 / 102, 102),
        (1000, 1000 / 102, 102),
    ],
)
def test_beyond_the_measured_concurrency(requests: float, step: float, together: float) -> None:
    """Beyond the last level, all requests together get the rate of that level."""
    assert known().step_at(requests) == pytest.approx(step)
    assert known().together_at(requests) == pytest.approx(together)


@pytest.mark.parametrize("gap", ["prefill_tokens_per_second", "decode_tokens_per_second", "output_tokens_per_second"])
def test_an_incomplete_measurement(gap: str) -> None:
    """A measurement that lacks a figure gives no profile."""
    assert SpeedProfile.measured(measurement(load(1, **{gap: 0.0}))) is None


def test_slots_are_limited_by_the_engine() -> None:
    """Rates between levels are interpolated, so `max_num_seqs` of the engine limits the slots."""
    setup = MEASURED.setup.model_copy(update={"max_num_seqs": 5})
    loads = (load(1, output_tokens_per_second=36.0), load(4, output_tokens_per_second=100.0), load(8))
    for most, slots in ((None, 8), (5, 5), (64, 8)):
        limited = measurement(*loads).model_copy(update={"setup": setup.model_copy(update={"max_num_seqs": most})})
        speed = SpeedProfile.measured(limited)
        assert speed is not None
        assert speed.slots == slots


def slots_after(*polls: tuple[float, float]) -> float:
    """The observed slots after polls of running and waiting requests, four per second."""
    known, before = inf, None
    for number, (running, waiting) in enumerate(polls):
        poll = EngineMetrics(number / 4, running, waiting)
        known, before = observed_slots(known, before, poll), poll
    return known


@pytest.mark.parametrize(
    "polls, slots",
    [
        ([(8, 0), (8, 0)], inf),
        # A request that has just arrived also waits for a moment.
        ([(2, 0), (2, 9)], inf),
        ([(8, 9), (8, 9)], 8),
        # All answers end together, so for a moment hardly any request runs.
        ([(8, 9), (1, 9)], 8),
        ([(1, 9), (8, 9)], 8),
        ([(8, 9), (8, 9), (1, 9), (8, 9)], 8),
        ([(8, 9), (8, 9), (12, 9)], 12),
        ([(8, 9), (8, 9), (8, 0)], inf),
    ],
)
def test_observed_slots(polls: list[tuple[float, float]], slots: float) -> None:
    """The slots are as many requests as run while others wait."""
    assert slots_after(*polls) == pytest.approx(slots)


@pytest.mark.parametrize("tokens, slots", [((5.0, 5.0), inf), ((5.0, 6.0), 1.0), ((None, None), 1.0)])
def test_polls_within_the_reading_of_a_prompt_show_no_limit(tokens: tuple[float | None, ...], slots: float) -> None:
    """A request waits behind a long prompt: without a generated token between two polls nothing is learned."""
    before, poll = (EngineMetrics(at / 4, 1.0, 1.0, generated_tokens=count) for at, count in enumerate(tokens))
    assert observed_slots(inf, before, poll) == slots
    assert observed_slots(8.0, before, poll) == (8.0 if slots == inf else pytest.approx(8 - 7 * (1 - exp(-0.05))))


def test_observed_slots_shrink() -> None:
    """If the engine runs fewer requests for some seconds, because they are longer, the slots shrink."""
    assert slots_after((8, 9), (8, 9), *[(2, 9)] * 40) == pytest.approx(2, abs=1)


@pytest.mark.parametrize("slower", [0.5, 1.0, 5.0])
def test_slowdown(slower: float) -> None:
    """The slowdown of reading is learned from first tokens, that of answering from tokens per second."""
    slowdown = NO_SLOWDOWN
    for _ in range(30):
        slowdown = first_token(slowdown, 0.2, 0.2 * slower)
    assert slowdown.reading == pytest.approx(slower, rel=0.1)
    assert slowdown.answering == 1
    for _ in range(20):
        slowdown = answered(slowdown, 100.0, 100.0 / slower, 1.0)
    assert slowdown.answering == pytest.approx(slower, rel=0.1)


def test_one_slow_first_token() -> None:
    """One slow first token counts little; without any, reading has the slowdown of answering."""
    assert first_token(NO_SLOWDOWN, 0.1, 1.0).reading < 4
    assert answered(NO_SLOWDOWN, 100.0, 10.0, 100.0).reading == pytest.approx(10, rel=0.01)


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(0, 1e6)), max_size=20))
def test_slowdown_is_bounded(observations: list[tuple[float, float]]) -> None:
    """No observation makes a replica infinitely fast or slow."""
    slowdown = NO_SLOWDOWN
    for expected, observed in observations:
        slowdown = answered(first_token(slowdown, expected, observed), expected, observed, 1.0)
    assert 1 / MAX_SLOWDOWN <= slowdown.reading <= MAX_SLOWDOWN
    assert 1 / MAX_SLOWDOWN <= slowdown.answering <= MAX_SLOWDOWN


def test_learning_without_a_measurement() -> None:
    """A profile is known once reading and answering were observed; its slots stay unknown."""
    learned = estimate_first_token(NO_ESTIMATE, 0.5, 100)
    assert learned.speed(64) is None
    learned = estimate_answering(learned, 4, 100, 1.0)
    speed = learned.speed(64)
    assert speed is not None
    assert (speed.slots, speed.answer_tokens) == (None, 64)
    assert speed.reading_seconds == pytest.approx(0.005)
    assert speed.step_at(1) == speed.step_at(500) == pytest.approx(0.04)
    assert speed.together_at(500) == pytest.approx(12_500)
