"""Gates of a rollout: rates of both errors, and the mistakes that a simpler test makes."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.rollout.evidence import (
    EventCounts,
    MeanDifference,
    Moments,
    interval,
    mixture_rho,
    moments,
    normal_mixture,
    passes_ceiling,
    with_block,
    with_events,
)
from gateway.rollout.gates import (
    DEFAULT_GATES,
    ArmBlock,
    Block,
    EventGate,
    EventSettings,
    MeanGate,
    MeanSettings,
    begin_step,
    new_gates,
    observe,
    verdict,
)
from tests.benchmarks.rollout.simulation import STEPS, Scenario, run_rollout

ALPHA = 0.05
LIMIT = -math.log(ALPHA)


def test_the_e_value_of_events_by_hand() -> None:
    """One event of the canary at weight 1/2 without tolerance: each ratio r gains log(2 r / (1 + r))."""
    counts = with_events(EventCounts(ratios=(3.0,), log_ratios=(0.0,)), canary=1, stable=0, weight=0.5)
    assert counts.log_e == pytest.approx(math.log(1.5))
    assert with_events(counts, 0, 1, 0.5).log_e == pytest.approx(math.log(1.5 * 0.5))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_weight_without_a_lottery_is_no_evidence(weight: float) -> None:
    """With weight 0 or 1 every event has one possible arm."""
    assert with_events(EventCounts(), 5, 0, weight).log_e == pytest.approx(0.0)


@given(st.integers(0, 400), st.integers(0, 400), st.floats(0.01, 0.99))
def test_the_order_of_events_does_not_matter(canary: int, stable: int, weight: float) -> None:
    """Blocks can be cut anywhere."""
    at_once = with_events(EventCounts(1.1), canary, stable, weight)
    apart = with_events(with_events(EventCounts(1.1), canary, 0, weight), 0, stable, weight)
    assert at_once.log_e == pytest.approx(apart.log_e, abs=1e-6)


@given(st.lists(st.floats(-50, 50), max_size=40))
def test_moments(values: list[float]) -> None:
    """Mean and squares are those of numpy."""
    summary = moments(values)
    assert summary.count == len(values)
    if values:
        assert summary.mean == pytest.approx(np.mean(values), abs=1e-9)
        assert summary.squares == pytest.approx(np.var(values) * len(values), abs=1e-6)


def test_a_mean_is_not_judged_before_its_variance_is_known() -> None:
    """Thirty values of each arm come first; blocks with one arm only never count."""
    test = MeanDifference(0.0, mixture_rho(ALPHA, math.log(1.2)))
    far = with_block(test, Moments(29, 9.0, 29.0), Moments(29, 0.0, 29.0))
    assert interval(far) is None
    assert interval(with_block(far, Moments(5, 9.0, 5.0), Moments(5, 0.0, 5.0))) is None
    ready = with_block(far, Moments(5, 9.0, 5.0), Moments(5, 0.0, 5.0))
    assert interval(with_block(ready, Moments(5, 9.0, 5.0), Moments())) is None
    assert interval(with_block(ready, Moments(5, 9.0, 5.0), Moments(5, 0.0, 5.0))) is not None


def test_the_interval_covers_at_every_moment() -> None:
    """A drift that both arms share does not move the estimate, and 95 % of the sequences never leave the truth."""
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        test, inside = MeanDifference(0.0, mixture_rho(ALPHA, math.log(1.2))), True
        for number in range(80):
            drift = math.sin(number / 9)
            canary, stable = random.normal(drift + 0.1, 0.5, 4), random.normal(drift, 0.5, 12)
            test = with_block(test, moments(list(canary)), moments(list(stable)))
            bounds = interval(test)
            inside &= bounds is None or bounds[0] <= 0.1 <= bounds[2]
        covered += inside
    assert covered >= 185


@given(st.floats(-1e6, 1e6), st.floats(0.001, 1e3), st.floats(0, 1e7))
def test_less_excess_is_less_evidence(excess: float, step: float, precision: float) -> None:
    """Also far below the margin, where probabilities underflow."""
    rho = mixture_rho(ALPHA, math.log(1.2))
    less, more = (normal_mixture(each, precision, rho) for each in (excess - step, excess))
    assert less <= more + 1e-9 * abs(more)
    assert normal_mixture(-abs(excess), precision, rho) <= 1e-9


def test_answers_of_one_length_are_alike() -> None:
    """Thousands of equal values are no evidence of a difference, in neither direction."""
    test = MeanDifference(0.05, mixture_rho(ALPHA, math.log(1.15)))
    for _ in range(200):
        test = with_block(test, Moments(20, math.log(17), 0.0), Moments(60, math.log(17), 0.0))
    assert test.log_e < 0


def test_what_nearly_every_conversation_has_cannot_become_more_frequent() -> None:
    """Where clients ask for few tokens, every answer is cut: there is nothing to show."""
    all_cut = {"cut_by_length": 40}
    gates = new_gates([EventSettings("cut_by_length"), EventSettings("errors")], len(STEPS))
    cut, errors = observe(begin_step(gates), Block(0.5, ArmBlock(40, all_cut), ArmBlock(40, all_cut)))
    assert (cut.verdict, errors.verdict) == ("pass", "more")


def test_a_rate_passes_without_any_event() -> None:
    """About a hundred conversations without an event rule out a rate of 4 %; sixty do not, nor do hundred with four."""
    assert passes_ceiling(0, 107, 0.04) >= math.log(20)
    assert passes_ceiling(0, 60, 0.04) < math.log(20)
    assert passes_ceiling(4, 100, 0.04) < math.log(20)


def test_gates_fail_for_good_and_say_what_they_need() -> None:
    """A verdict of fail stays; without evidence every gate needs conversations; all gates must pass."""
    gates = begin_step(new_gates(DEFAULT_GATES, len(STEPS)))
    assert {gate.verdict for gate in gates} == {"more"}
    assert all(gate.needed_conversations() > 0 for gate in gates)
    bad = Block(0.5, ArmBlock(100, {"errors": 40}), ArmBlock(100, {"errors": 1}))
    good = Block(0.5, ArmBlock(1000, {"errors": 1}), ArmBlock(1000, {"errors": 1}))
    gates = observe(gates, bad)
    assert verdict(gates) == "fail"
    for _ in range(20):
        gates = observe(gates, good)
    assert verdict(gates) == "fail"


def test_what_is_needed_is_enough() -> None:
    """After as many more conversations as a gate says that it needs, it passes."""
    settings = (EventSettings("errors"), MeanSettings("first_token_time", "first_token_seconds"))
    events, means = observe(begin_step(new_gates(settings, 1)), _quiet_block(60))
    assert isinstance(events, EventGate)
    assert isinstance(means, MeanGate)
    needed = events.needed_conversations()
    assert observe([events], _quiet_block(needed))[0].verdict == "pass"
    assert observe([events], _quiet_block(needed - 2))[0].verdict == "more"
    means = observe([means], _quiet_block(60))[0]
    assert isinstance(means, MeanGate)
    for _ in range(math.ceil(means.needed_conversations() / 60) + 1):
        (means,) = observe([means], _quiet_block(60))
        assert isinstance(means, MeanGate)
    assert means.verdict == "pass"
    low, middle, high = means.interval or (0.0, 0.0, 0.0)
    assert low < 1.0 < high
    assert middle == pytest.approx(1.0)


def _quiet_block(conversations: int) -> Block:
    arm = ArmBlock(conversations, {}, {"first_token_seconds": Moments(conversations, 0.0, 0.25 * conversations)})
    return Block(0.5, arm, arm)


@pytest.mark.parametrize(
    "scenario,at_least,at_most",
    [
        (Scenario("identical"), 0, 1),
        (Scenario("success .99 -> .96", canary_errors=0.04), 20, 20),
        (Scenario("first token +20 %", first_token=1.2), 20, 20),
    ],
    ids=lambda value: value.name if isinstance(value, Scenario) else str(value),
)
def test_a_worse_variant_is_stopped_and_an_identical_one_is_not(
    scenario: Scenario, at_least: int, at_most: int
) -> None:
    """Twenty rollouts at 10 conversations a second; the study has 500 of each."""
    random = np.random.default_rng(11)
    outcomes = [run_rollout(scenario, random) for _ in range(20)]
    assert at_least <= sum(outcome.stopped_seconds is not None for outcome in outcomes) <= at_most
    if not at_most:
        assert all(outcome.passed_seconds is not None for outcome in outcomes)


# The mistakes of simpler tests, on identical variants: each of them, and what the gates make of the same data.


@pytest.mark.parametrize(
    "loud,stopped_by_z",
    [(0.03, 54), (0.01, 15)],
    ids=["errors triple with the 50 % step", "a look every minute"],
)
def test_a_z_test_on_pooled_arms(loud: float, stopped_by_z: int) -> None:
    """A z-test each minute stops most of 60 identical rollouts, or far more than alpha; the gate stops hardly one."""
    random = np.random.default_rng(3)
    by_z = by_gate = 0
    for _ in range(60):
        counts, totals, z_failed, e_failed = EventCounts(), np.zeros(4), False, False
        for number, (weight, rate) in enumerate(_steps(quiet=0.01, loud=loud), start=1):
            canary = int(random.binomial(100, weight))
            events = random.binomial([canary, 100 - canary], rate)
            totals += (events[0], canary, events[1], 100 - canary)
            counts = with_events(counts, int(events[0]), int(events[1]), weight)
            e_failed |= counts.log_e >= LIMIT
            z_failed |= number % 6 == 0 and _z(*totals) > 1.645
        by_z, by_gate = by_z + z_failed, by_gate + e_failed
    assert by_z >= stopped_by_z
    assert by_gate <= 6


def test_bursts_of_errors_count_once_for_a_conversation() -> None:
    """Two percent of the conversations fail half of their ten turns: counted by request, far too many are stopped."""
    random = np.random.default_rng(6)
    by_request = by_conversation = 0
    for _ in range(100):
        requests, conversations, failed = EventCounts(), EventCounts(), [False, False]
        for weight, _ in _steps(quiet=0.0, loud=0.0):
            canary = int(random.binomial(10, weight))
            bad = random.binomial([canary, 10 - canary], 0.02)
            turns = random.binomial(bad * 10, 0.5)
            requests = with_events(requests, int(turns[0]), int(turns[1]), weight)
            conversations = with_events(conversations, int(bad[0]), int(bad[1]), weight)
            failed = [failed[0] or requests.log_e >= LIMIT, failed[1] or conversations.log_e >= LIMIT]
        by_request, by_conversation = by_request + failed[0], by_conversation + failed[1]
    assert by_request >= 25
    assert by_conversation <= 10


def test_a_cold_prefix_cache_needs_a_prediction() -> None:
    """First tokens of a new replica are late while its cache is cold: as a ratio to what is predicted they are not."""
    random = np.random.default_rng(7)
    measured = predicted = 0
    for _ in range(30):
        raw = adjusted = MeanDifference(0.0, mixture_rho(ALPHA, math.log(1.2)))
        failed = [False, False]
        for number, (weight, _) in enumerate(_steps(quiet=0.0, loud=0.0)):
            canary = int(random.binomial(100, weight))
            cold = 0.4 * math.log(3) * max(1 - number / 120, 0.0)
            # The canary misses its cache more often; the speed profile predicts what that costs.
            values = random.normal(0.0, 0.7, canary)
            stable = moments(list(random.normal(0.0, 0.7, 100 - canary)))
            raw = with_block(raw, moments(list(values + cold)), stable)
            adjusted = with_block(adjusted, moments(list(values)), stable)
            failed = [failed[0] or raw.log_e >= LIMIT, failed[1] or adjusted.log_e >= LIMIT]
        measured, predicted = measured + failed[0], predicted + failed[1]
    assert measured >= 15
    assert predicted <= 4


def test_a_late_effect_is_found_by_the_process_of_its_step() -> None:
    """A canary that is slower only at a large share is stopped soon after, whatever the evidence before says."""
    gates = new_gates([EventSettings("errors", tolerance=1.0)], 2)
    quiet = Block(0.05, ArmBlock(50, {"errors": 0}), ArmBlock(950, {"errors": 30}))
    loud = Block(0.5, ArmBlock(500, {"errors": 60}), ArmBlock(500, {"errors": 15}))
    gates = begin_step(gates)
    for _ in range(40):
        gates = observe(gates, quiet)
    late = observe(begin_step(gates), loud)
    assert isinstance(late[0], EventGate)
    without_steps = replace(late[0], since=(), steps=0)
    assert late[0].verdict == "fail"
    assert without_steps.log_e < LIMIT


def _steps(quiet: float, loud: float) -> list[tuple[float, float]]:
    """Weight and rate of each block of a rollout; `loud` is the rate of the last step."""
    weights = [weight for weight, seconds in STEPS for _ in range(int(seconds / 10))]
    return [(weight, loud if weight == STEPS[-1][0] else quiet) for weight in weights]


def _z(canary_events: float, canary: float, stable_events: float, stable: float) -> float:
    pooled = (canary_events + stable_events) / (canary + stable)
    variance = pooled * (1 - pooled) * (1 / max(canary, 1) + 1 / max(stable, 1))
    return float((canary_events / max(canary, 1) - stable_events / max(stable, 1)) / math.sqrt(max(variance, 1e-12)))
