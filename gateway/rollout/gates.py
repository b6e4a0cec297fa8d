"""The gates of a rollout: what is compared between canary and stable variant, and what a comparison says so far.

Evidence is collected from the first canary conversation to the end of the rollout and never restarted. A second set of
processes begins with each step, so that an effect of a larger share is found soon, too: the e-value of a gate is the
mean of both.

==================  ======================================================================================
verdict             when
==================  ======================================================================================
fail                the e-value has reached 1 / alpha once; it stays so
pass                enough evidence that there is no effect of the size that the gate looks for; or there is nothing
                    to show: hardly any conversation has the quantity, such as reasoning tokens, or nearly all of
                    the stable variant's have the event, such as answers cut where clients ask for one token
more                neither; `needed_conversations` says how many more of the canary's it takes, at its rate
==================  ======================================================================================
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from gateway.rollout.evidence import (
    MIN_VALUES,
    EventCounts,
    MeanDifference,
    Moments,
    interval,
    log_mean_exp,
    mixture_rho,
    passes_ceiling,
    target_precision,
    with_block,
    with_events,
)

Verdict = Literal["pass", "fail", "more"]
# A gate passes once it has seen so many times what a test with one look needs (simulated: enough in 95 % of cases).
_PASS_FACTOR = 1.6
# What shows that events of the canary are not more frequent than those of the stable variant plus a margin.
_PASS_LOG_E = math.log(20)
MAX_NEEDED = 10_000_000
EVENT_MARGIN = 0.03  # of rates
# A mean has to be shown only if so large a share of the stable variant's conversations has the quantity.
_MIN_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class EventSettings:
    """A gate on how often conversations have an event.

    `tolerance` is the ratio canary / stable that is accepted, `margin` the difference of rates that passing rules out.
    """

    name: str
    tolerance: float = 1.1
    margin: float = EVENT_MARGIN


@dataclass(frozen=True, slots=True)
class MeanSettings:
    """A gate on the mean of the logarithm of a quantity, one value per conversation.

    `margin` is the accepted difference, `effect` the one that must be found. `sign` -1 looks for smaller values.
    """

    name: str
    quantity: str
    margin: float = 0.03
    effect: float = math.log(1.2)
    sign: Literal[1, -1] = 1


GateSettings = EventSettings | MeanSettings

_LONGER = math.log(1.15)
# `slow_first_token`: later than the stable variant's p95, known from the blocks before.
DEFAULT_GATES: tuple[GateSettings, ...] = (
    EventSettings("errors"),
    EventSettings("cut_by_length"),
    EventSettings("open_thinking"),
    EventSettings("invalid_tool_call"),
    EventSettings("empty_or_looping"),
    EventSettings("slow_first_token", margin=0.05),
    MeanSettings("first_token_time", "first_token_seconds"),
    MeanSettings("token_time", "token_seconds"),
    MeanSettings("longer_answer", "answer_tokens", margin=0.05, effect=_LONGER),
    MeanSettings("shorter_answer", "answer_tokens", margin=0.05, effect=_LONGER, sign=-1),
    MeanSettings("longer_reasoning", "reasoning_tokens", margin=0.05, effect=_LONGER),
    MeanSettings("shorter_reasoning", "reasoning_tokens", margin=0.05, effect=_LONGER, sign=-1),
)


@dataclass(frozen=True, slots=True)
class ArmBlock:
    """What happened to the conversations of one arm in a block of time.

    `events` counts conversations by event, `values` summarizes the logarithms of quantities.
    """

    conversations: int = 0
    events: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, Moments] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Block:
    """A block of time (10 s) in which the canary had one weight; conversations belong to the arm that was drawn."""

    weight: float
    canary: ArmBlock
    stable: ArmBlock


@dataclass(frozen=True, slots=True)
class EventGate:
    """The evidence of an EventSettings gate; `since` are the processes that began with each step."""

    settings: EventSettings
    alpha: float
    steps: int
    whole: EventCounts
    since: tuple[EventCounts, ...] = ()
    canary: tuple[int, int] = (0, 0)  # events, conversations
    stable: tuple[int, int] = (0, 0)
    failed: bool = False

    @property
    def log_e(self) -> float:
        """The logarithm of the e-value now."""
        return _late_log_e(self.whole.log_e, [each.log_e for each in self.since], self.steps)

    @property
    def ceiling(self) -> float:
        """The rate of events that passing rules out."""
        events, conversations = self.stable
        return min((events / conversations if conversations else 0.0) + self.settings.margin, 0.99)

    @property
    def verdict(self) -> Verdict:
        """What the evidence says."""
        if self.failed:
            return "fail"
        if self._common:
            return "pass"
        shown = self.stable[1] > 0 and passes_ceiling(*self.canary, self.ceiling) >= _PASS_LOG_E
        return "pass" if shown else "more"

    @property
    def _common(self) -> bool:
        """Whether the stable variant has the event so often that the canary can't exceed that by the margin."""
        events, conversations = self.stable
        return conversations >= MIN_VALUES and events >= (1 - self.settings.margin) * conversations

    def needed_conversations(self) -> int:
        """How many more conversations of the canary it takes to pass, if its rate stays."""
        events, conversations = self.canary
        rate = events / conversations if conversations else 0.0

        def shown(count: int) -> bool:
            return passes_ceiling(round(rate * count), count, self.ceiling) >= _PASS_LOG_E

        return max(_smallest(shown) - conversations, 0)


@dataclass(frozen=True, slots=True)
class MeanGate:
    """The evidence of a MeanSettings gate."""

    settings: MeanSettings
    alpha: float
    steps: int
    whole: MeanDifference
    since: tuple[MeanDifference, ...] = ()
    failed: bool = False
    stable_conversations: int = 0

    @property
    def log_e(self) -> float:
        """The logarithm of the e-value now."""
        return _late_log_e(self.whole.log_e, [each.log_e for each in self.since], self.steps)

    @property
    def target(self) -> float:
        """The precision at which the gate passes."""
        return _PASS_FACTOR * target_precision(self.alpha, self.settings.effect - self.settings.margin)

    @property
    def verdict(self) -> Verdict:
        """What the evidence says."""
        if self.failed:
            return "fail"
        return "pass" if self.whole.precision >= self.target or self._rare else "more"

    @property
    def _rare(self) -> bool:
        """Whether hardly any conversation has the quantity, as far as that is known."""
        return self.stable_conversations >= MIN_VALUES and self.whole.stable < _MIN_SHARE * self.stable_conversations

    @property
    def interval(self) -> tuple[float, float, float] | None:
        """Lower bound, estimate and upper bound of the ratio canary / stable."""
        bounds = interval(self.whole)
        if bounds is None:
            return None
        low, middle, high = sorted(math.exp(self.settings.sign * bound) for bound in bounds)
        return low, middle, high

    def needed_conversations(self) -> int:
        """How many more conversations of the canary it takes to pass, if shares and variance stay."""
        if not self.whole.precision:
            return MAX_NEEDED
        per_conversation = self.whole.precision / max(self.whole.canary, 1)
        return max(math.ceil((self.target - self.whole.precision) / per_conversation), 0)


Gate = EventGate | MeanGate


def new_gates(settings: Sequence[GateSettings], steps: int, alpha: float = 0.05) -> tuple[Gate, ...]:
    """Create gates without evidence; `alpha`, the risk of stopping an identical variant, is split evenly over them."""
    share = alpha / max(len(settings), 1)
    gates: list[Gate] = []
    for each in settings:
        if isinstance(each, EventSettings):
            gates.append(EventGate(each, share, steps, EventCounts(each.tolerance)))
        else:
            rho = mixture_rho(share, each.effect - each.margin)
            gates.append(MeanGate(each, share, steps, MeanDifference(each.margin, rho)))
    return tuple(gates)


def begin_step(gates: Sequence[Gate]) -> tuple[Gate, ...]:
    """Begin a process for a new step in each gate; what was learned about the variance is kept."""
    begun: list[Gate] = []
    for gate in gates:
        if isinstance(gate, EventGate):
            begun.append(replace(gate, since=(*gate.since, EventCounts(gate.settings.tolerance))))
        else:
            fresh = replace(gate.whole, precision=0.0, excess=0.0, difference=0.0)
            begun.append(replace(gate, since=(*gate.since, fresh)))
    return tuple(begun)


def observe(gates: Sequence[Gate], block: Block) -> tuple[Gate, ...]:
    """Add a block of time to every gate."""
    return tuple(
        _with_events(gate, block) if isinstance(gate, EventGate) else _with_means(gate, block) for gate in gates
    )


def verdict(gates: Sequence[Gate]) -> Verdict:
    """Fail if one gate fails, pass if all of them do."""
    verdicts = {gate.verdict for gate in gates}
    if "fail" in verdicts:
        return "fail"
    return "more" if "more" in verdicts else "pass"


def _with_events(gate: EventGate, block: Block) -> EventGate:
    name = gate.settings.name
    canary, stable = block.canary.events.get(name, 0), block.stable.events.get(name, 0)

    def added(counts: EventCounts) -> EventCounts:
        return with_events(counts, canary, stable, block.weight)

    after = replace(
        gate,
        whole=added(gate.whole),
        since=tuple(map(added, gate.since)),
        canary=(gate.canary[0] + canary, gate.canary[1] + block.canary.conversations),
        stable=(gate.stable[0] + stable, gate.stable[1] + block.stable.conversations),
    )
    return replace(after, failed=gate.failed or _exceeds(after.log_e, gate.alpha))


def _with_means(gate: MeanGate, block: Block) -> MeanGate:
    settings = gate.settings
    canary = _signed(block.canary.values.get(settings.quantity, Moments()), settings.sign)
    stable = _signed(block.stable.values.get(settings.quantity, Moments()), settings.sign)

    def added(test: MeanDifference) -> MeanDifference:
        return with_block(test, canary, stable)

    seen = gate.stable_conversations + block.stable.conversations
    after = replace(gate, whole=added(gate.whole), since=tuple(map(added, gate.since)), stable_conversations=seen)
    return replace(after, failed=gate.failed or _exceeds(after.log_e, gate.alpha))


def _signed(values: Moments, sign: int) -> Moments:
    return values if sign > 0 else Moments(values.count, -values.mean, values.squares)


def _exceeds(log_e: float, alpha: float) -> bool:
    return log_e >= -math.log(alpha)


def _late_log_e(whole: float, since: Sequence[float], steps: int) -> float:
    """Half of the whole process, half of the mean of those of the steps; one that has not begun is worth 1."""
    waiting = [0.0] * max(steps - len(since), 0)
    return log_mean_exp((whole, log_mean_exp([*since, *waiting]))) if since or waiting else whole


def _smallest(shown: Callable[[int], bool]) -> int:
    """The smallest count for which a condition holds that holds for all larger ones; MAX_NEEDED if it is larger."""
    high = 1
    while not shown(high):
        high *= 2
        if high > MAX_NEEDED:
            return MAX_NEEDED
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high
