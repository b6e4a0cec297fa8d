"""How fast a replica is: as measured, and as seen of late."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.capacity import Shape
from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.speed import (
    FURTHEST,
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
    """The speed above."""
    speed = SpeedProfile.measured(MEASURED)
    assert speed is not None
    return speed


def test_what_a_measurement_says() -> None:
    """Tables by how many there are; slots where all together get hardly more; reading apart from the first step."""
    speed = known()
    assert len(speed.step_seconds) == len(speed.together) == 8
    assert speed.step_seconds[0] == pytest.approx(1 / 40)
    assert speed.step_seconds[3] == pytest.approx(1 / 30)
    assert speed.together[3] == pytest.approx(100)
    assert speed.slots == 4
    assert speed.answer_tokens == 64
    # 40 tokens at 200 a second are 0.2 s, of which one step is the first token's own.
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
def test_more_than_were_measured_share(requests: float, step: float, together: float) -> None:
    """Beyond the last level all together get no more than there."""
    assert known().step_at(requests) == pytest.approx(step)
    assert known().together_at(requests) == pytest.approx(together)


@pytest.mark.parametrize("gap", ["prefill_tokens_per_second", "decode_tokens_per_second", "output_tokens_per_second"])
def test_half_a_measurement_is_none(gap: str) -> None:
    """Without one of its figures, nothing is in seconds."""
    assert SpeedProfile.measured(measurement(load(1, **{gap: 0.0}))) is None


def test_no_more_places_than_the_engine_was_given() -> None:
    """Between 4 and 8 at once the rates are read off a line, which rises where an engine takes no more than 5."""
    setup = MEASURED.setup.model_copy(update={"max_num_seqs": 5})
    loads = (load(1, output_tokens_per_second=36.0), load(4, output_tokens_per_second=100.0), load(8))
    for most, slots in ((None, 8), (5, 5), (64, 8)):
        found = measurement(*loads).model_copy(update={"setup": setup.model_copy(update={"max_num_seqs": most})})
        speed = SpeedProfile.measured(found)
        assert speed is not None
        assert speed.slots == slots


def looks(*found: tuple[float, float]) -> float:
    """How many slots polls have shown that found so many running and waiting, four times a second."""
    known, before = inf, None
    for number, (running, waiting) in enumerate(found):
        poll = EngineMetrics(number / 4, running, waiting)
        known, before = observed_slots(known, before, poll), poll
    return known


@pytest.mark.parametrize(
    "found, slots",
    [
        ([(8, 0), (8, 0)], inf),
        # Whoever came a moment ago waits, too.
        ([(2, 0), (2, 9)], inf),
        ([(8, 9), (8, 9)], 8),
        # All answers end together, and for a moment hardly any runs.
        ([(8, 9), (1, 9)], 8),
        ([(1, 9), (8, 9)], 8),
        ([(8, 9), (8, 9), (1, 9), (8, 9)], 8),
        ([(8, 9), (8, 9), (12, 9)], 12),
        ([(8, 9), (8, 9), (8, 0)], inf),
    ],
)
def test_how_many_an_engine_takes(found: list[tuple[float, float]], slots: float) -> None:
    """As many as it runs while others wait."""
    assert looks(*found) == pytest.approx(slots)


def test_an_engine_that_takes_fewer_than_before() -> None:
    """Longer requests fill its cache: after some seconds that is believed."""
    assert looks((8, 9), (8, 9), *[(2, 9)] * 40) == pytest.approx(2, abs=1)


@pytest.mark.parametrize("slower", [0.5, 1.0, 5.0])
def test_a_replica_that_is_slower_than_measured(slower: float) -> None:
    """Its pace is believed after some ten first tokens, and some seconds of answering."""
    pace = NO_SLOWDOWN
    for _ in range(30):
        pace = first_token(pace, 0.2, 0.2 * slower)
    assert pace.reading == pytest.approx(slower, rel=0.1)
    assert pace.answering == 1
    for _ in range(20):
        pace = answered(pace, 100.0, 100.0 / slower, 1.0)
    assert pace.answering == pytest.approx(slower, rel=0.1)


def test_one_slow_first_token_says_little() -> None:
    """It may have been anything; and where no first token was seen, answering tells."""
    assert first_token(NO_SLOWDOWN, 0.1, 1.0).reading < 4
    assert answered(NO_SLOWDOWN, 100.0, 10.0, 100.0).reading == pytest.approx(10, rel=0.01)


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(0, 1e6)), max_size=20))
def test_a_pace_is_bounded(seen: list[tuple[float, float]]) -> None:
    """Whatever is observed, a replica is neither infinitely fast nor dead."""
    pace = NO_SLOWDOWN
    for expected, observed in seen:
        pace = answered(first_token(pace, expected, observed), expected, observed, 1.0)
    assert 1 / FURTHEST <= pace.reading <= FURTHEST
    assert 1 / FURTHEST <= pace.answering <= FURTHEST


def test_what_nobody_measured_is_learnt() -> None:
    """As soon as both speeds were seen; how many it takes at once stays unknown."""
    learnt = estimate_first_token(NO_ESTIMATE, 0.5, 100)
    assert learnt.speed(64) is None
    learnt = estimate_answering(learnt, 4, 100, 1.0)
    speed = learnt.speed(64)
    assert speed is not None
    assert (speed.slots, speed.answer_tokens) == (None, 64)
    assert speed.reading_seconds == pytest.approx(0.005)
    assert speed.step_at(1) == speed.step_at(500) == pytest.approx(0.04)
    assert speed.together_at(500) == pytest.approx(12_500)
