"""What is simulated: loads in multiples of what the fleet's best rung takes, waves, ramps, faults, bursts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tests.benchmarks.routing.figures import Figures, Objective, figures_of
from tests.benchmarks.routing.policies import LeastInFlight
from tests.benchmarks.routing.profiles import Fleet
from tests.benchmarks.routing.runs import Fault, Scenario
from tests.benchmarks.routing.simulation import simulate
from tests.benchmarks.routing.workloads import (
    CHATS,
    Conversation,
    Mix,
    Rate,
    Turn,
    constant,
    conversations,
    ramp,
    square,
)

STEADY = (0.7, 1.0, 1.25, 1.5, 2.0, 3.0)
SQUARE_PERIOD_SECONDS = 60.0
STRICT = replace(CHATS, strict_share=0.1)  # one conversation in ten takes nothing below the best rung
BURST_TURNS, BURST_SECONDS = 64, 0.25
FAULT_AT, FAULT_LOAD = 0.4, 1.25


@dataclass(frozen=True, slots=True)
class Ground:
    """What all scenarios of a benchmark share; `capacity` is of its best rung, in turns a second."""

    fleet: Fleet
    capacity: float
    seconds: float
    mix: Mix = CHATS

    def scenario(self, rate: Rate, most: float, seed: int, faults: Sequence[Fault] = ()) -> Scenario:
        """Make a scenario of a rate of turns."""
        asked = conversations(rate, most, self.seconds, mix=self.mix, seed=seed)
        return Scenario(self.fleet, asked, self.seconds, faults, seed=seed)


def best_rung_capacity(fleet: Fleet, objective: Objective, mix: Mix = CHATS, seconds: float = 300.0) -> float:
    """Find the highest Poisson rate of turns at which 95 % of first tokens of the best rung come within the objective.

    Its replicas share the load by least requests in flight; a rate is held against two workloads.
    """
    best = fleet.only(fleet.rungs[0])

    def holds(rate: float) -> bool:
        waits = []
        for seed in (101, 102):
            asked = conversations(constant(rate), rate, seconds, mix=mix, seed=seed)
            run = simulate(Scenario(best, asked, seconds, seed=seed), lambda _: LeastInFlight(best))
            waits.append(figures_of(run, objective).first_token_p95)
        return max(waits) <= objective.first_token_seconds

    low, high = 0.0, 1.0
    while holds(high):
        low, high = high, 2 * high
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def steady(ground: Ground, times: float, seed: int) -> Scenario:
    """A constant rate."""
    rate = ground.capacity * times
    return ground.scenario(constant(rate), rate, seed)


def wave(ground: Ground, seed: int) -> Scenario:
    """Half and one and a half times the capacity in turn."""
    low, high = 0.5 * ground.capacity, 1.5 * ground.capacity
    return ground.scenario(square(low, high, SQUARE_PERIOD_SECONDS), high, seed)


def ramp_rate(ground: Ground) -> Rate:
    """From a third of the capacity to twice of it, and back."""
    return ramp(ground.capacity / 3, 2 * ground.capacity, ground.seconds)


def hill(ground: Ground, seed: int) -> Scenario:
    """The ramp."""
    return ground.scenario(ramp_rate(ground), 2 * ground.capacity, seed)


def faulty(ground: Ground, name: str, seed: int) -> Scenario:
    """A constant rate, one client in ten with a floor that only the best rung meets, and something that goes wrong."""
    rate = ground.capacity * FAULT_LOAD
    strict = replace(ground, mix=replace(ground.mix, strict_share=STRICT.strict_share))
    return strict.scenario(constant(rate), rate, seed, FAULTS[name](ground))


def _best(ground: Ground) -> str:
    return ground.fleet.only(ground.fleet.rungs[0]).members[0].id


def _killed(ground: Ground) -> list[Fault]:
    at = ground.seconds * FAULT_AT
    return [Fault(at, _best(ground), "kill"), Fault(at + 60, _best(ground), "restart")]


def _slow(ground: Ground) -> list[Fault]:
    return [Fault(0.0, _best(ground), "slow", factor=5.0)]


def _slows(ground: Ground) -> list[Fault]:
    at = ground.seconds * FAULT_AT
    return [Fault(at, _best(ground), "slow", factor=5.0), Fault(at + 60, _best(ground), "slow", factor=1.0)]


def _silent(ground: Ground) -> list[Fault]:
    at = ground.seconds * FAULT_AT
    return [
        fault
        for member in ground.fleet.members
        for fault in (Fault(at, member.id, "stop polls"), Fault(at + 10, member.id, "resume polls"))
    ]


def _renamed(ground: Ground) -> list[Fault]:
    at = ground.seconds * FAULT_AT
    return [Fault(at, member.id, "lose metric", metric="waiting") for member in ground.fleet.members]


FAULTS: Mapping[str, Callable[[Ground], list[Fault]]] = {
    "none": lambda _: [],
    "a best replica killed, back after 60 s": _killed,
    "a best replica 5 times slower than measured": _slow,
    "a best replica 5 times slower for 60 s": _slows,
    "no polls for 10 s": _silent,
    "num_requests_waiting renamed": _renamed,
}


def burst(fleet: Fleet) -> Scenario:
    """The same prompt many times at once, on the idle replicas of the best rung; each is a conversation of its own."""
    seconds, chain = 60.0, tuple(range(50))
    turns = [Turn(number, f"b{number}", 0, 800, 100, 800, chain, 1.0) for number in range(BURST_TURNS)]
    asked = [Conversation(5.0 + BURST_SECONDS * turn.key / BURST_TURNS, (turn,)) for turn in turns]
    return Scenario(fleet.only(fleet.rungs[0]), asked, seconds)


def mean_of(found: Sequence[Figures]) -> Figures:
    """One policy's figures over several seeds: sums of counts, means of the rest."""
    first = found[0]
    if len(found) == 1:
        return first
    counts = ("turns", "answered", "failed", "refused", "preemptions", "below_floor")
    means = {
        name: sum(getattr(each, name) for each in found) / len(found)
        for name in Figures.__dataclass_fields__
        if name not in (*counts, "policy", "shares")
    }
    sums = {name: sum(getattr(each, name) for each in found) for name in counts}
    mixed = {rung: sum(each.shares[rung] for each in found) / len(found) for rung in first.shares}
    return replace(first, shares=mixed, **means, **sums)
