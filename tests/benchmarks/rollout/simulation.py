"""Simulated rollouts, judged by the gates of the product.

Load, error rates and latency drift; both arms see the same drift. A block of 10 s is drawn as a whole: counts are
binomial, sums of normal values are normal, and their squares have a chi-square distribution.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from gateway.rollout.evidence import Moments
from gateway.rollout.gates import DEFAULT_GATES, ArmBlock, Block, GateSettings, begin_step, new_gates, observe, verdict

BLOCK_SECONDS = 10.0
# Weight, and seconds; the last step is held until the verdict.
STEPS = ((0.01, 300.0), (0.05, 300.0), (0.25, 300.0), (0.5, 1800.0))
_NORMAL = NormalDist()
_SPREADS = {"token_seconds": 0.35, "answer_tokens": 0.9, "reasoning_tokens": 0.9}
# Share of conversations that have each event, with the stable variant; the canary has its own error rate.
_RATES = {"cut_by_length": 0.02, "open_thinking": 0.005, "invalid_tool_call": 0.005, "empty_or_looping": 0.005}


@dataclass(frozen=True, slots=True)
class Scenario:
    """What differs between stable and canary variant; ratios and rates of the canary."""

    name: str
    per_second: float = 10.0
    stable_errors: float = 0.01
    canary_errors: float = 0.01
    first_token: float = 1.0
    first_token_spread: float = 0.5  # standard deviation of its logarithm
    length: float = 1.0
    drifts: bool = True
    gates: Sequence[GateSettings] = field(default=DEFAULT_GATES)


@dataclass(frozen=True, slots=True)
class Outcome:
    """When a rollout was stopped (None: it was not), and what the canary had answered until then."""

    stopped_seconds: float | None
    passed_seconds: float | None
    conversations: int
    share: float
    by: tuple[str, ...] = ()


def run_rollout(scenario: Scenario, random: np.random.Generator) -> Outcome:
    """Run one rollout until a gate fails, or to its end."""
    gates, seconds, passed, canary, total = new_gates(scenario.gates, len(STEPS)), 0.0, None, 0, 0
    weight = 0.0
    for block in blocks(scenario, random):
        seconds += BLOCK_SECONDS
        if block.weight != weight:
            gates, weight = begin_step(gates), block.weight
        gates = observe(gates, block)
        canary += block.canary.conversations
        total += block.canary.conversations + block.stable.conversations
        judged = verdict(gates)
        if judged == "fail":
            failed = tuple(gate.settings.name for gate in gates if gate.verdict == "fail")
            return Outcome(seconds, passed, canary, canary / max(total, 1), failed)
        if judged == "pass" and passed is None:
            passed = seconds
    return Outcome(None, passed, canary, canary / max(total, 1))


def blocks(scenario: Scenario, random: np.random.Generator) -> Iterator[Block]:
    """Draw the blocks of one rollout."""
    seconds = 0.0
    for weight, step_seconds in STEPS:
        for _ in range(int(step_seconds / BLOCK_SECONDS)):
            seconds += BLOCK_SECONDS
            drift = 1 + 0.6 * math.sin(seconds / 400) if scenario.drifts else 1.0
            load = 1 + 0.3 * math.sin(seconds / 700) if scenario.drifts else 1.0
            count = int(random.poisson(scenario.per_second * load * BLOCK_SECONDS))
            canary = int(random.binomial(count, weight))
            yield Block(
                weight,
                _arm(scenario, random, canary, drift, canary=True),
                _arm(scenario, random, count - canary, drift, canary=False),
            )


def _arm(scenario: Scenario, random: np.random.Generator, count: int, drift: float, *, canary: bool) -> ArmBlock:
    errors = scenario.stable_errors * drift
    slow = 0.05
    if canary:
        # Errors that a variant adds do not drift with those of everything else.
        errors += scenario.canary_errors - scenario.stable_errors
        later = math.log(scenario.first_token) / scenario.first_token_spread
        slow = 1 - _NORMAL.cdf(_NORMAL.inv_cdf(0.95) - later)
    rates = {
        "errors": errors,
        "slow_first_token": min(slow * drift, 0.5),
        **{name: rate * drift for name, rate in _RATES.items()},
    }
    events = {name: int(random.binomial(count, min(max(rate, 0.0), 1.0))) for name, rate in rates.items()}
    shifts = {"first_token_seconds": math.log(scenario.first_token), "answer_tokens": math.log(scenario.length)}
    spreads = {"first_token_seconds": scenario.first_token_spread, **_SPREADS}
    values = {
        name: _moments(random, count, drift + (shifts.get(name, 0.0) if canary else 0.0), spread)
        for name, spread in spreads.items()
    }
    return ArmBlock(count, events, values)


def _moments(random: np.random.Generator, count: int, mean: float, spread: float) -> Moments:
    if not count:
        return Moments()
    squares = spread**2 * float(random.chisquare(count - 1)) if count > 1 else 0.0
    return Moments(count, float(random.normal(mean, spread / math.sqrt(count))), squares)
