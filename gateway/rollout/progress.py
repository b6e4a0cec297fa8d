"""What the evidence of a rollout shows so far, and which event follows from all that is known. Pure."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from gateway.rollout.collection import read_block
from gateway.rollout.evidence import EventCounts, MeanAbove, mixture_rho, with_events, with_value
from gateway.rollout.gates import MAX_NEEDED, EventGate, Gate, Verdict, begin_step, new_gates, observe, verdict
from gateway.rollout.machine import (
    FINAL,
    Event,
    Phase,
    Readiness,
    RolloutState,
    carries_traffic,
    deadline,
    is_stalled,
)
from gateway.rollout.plan import RolloutPlan
from serving.replica import PENDING, ReplicaStatus, State
from serving.state.rollout_records import BlockRecord

# Sample-ratio mismatch: shares of conversations that differ by these factors, at this risk of a false alarm.
_SHARE_RATIOS = (0.5, 0.67, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0)
_SHARE_ALPHA = 0.001
# Shadowing is tested apart from the gates: its risk of a false alarm, and the excess (nats) that it is tuned for.
_SHADOW_ALPHA, _SHADOW_EFFECT = 0.005, 0.02
# A variant counts as lost when it has had no ready replica for so long.
LOST_SECONDS = 30.0
# A variant does not start when one of its replicas has failed so often: later attempts would take until the deadline.
# The supervisor gives up after `serving.start_attempts`, and a driver may miss a failure that is short.
FAILED_STARTS = 2
# So old is a phase before a variant counts as drained: every gateway has read the revision by then.
SETTLE_SECONDS = 5.0


@dataclass(slots=True)
class Progress:
    """The evidence of a rollout, block by block; the same for each process that reads all blocks."""

    plan: RolloutPlan
    gates: tuple[Gate, ...] = field(init=False)
    shares: EventCounts = field(init=False)
    shadow: MeanAbove = field(init=False)
    agreement: float = 0.0  # sums over shadowed answers
    old_agreement: float = 0.0
    shadow_failed: bool = False
    canary: int = 0  # conversations
    stable: int = 0
    canary_by_step: dict[int, int] = field(default_factory=dict)
    progress_at: float = 0.0
    _seen: set[tuple[str, int]] = field(default_factory=set)
    _step: int = -1

    def __post_init__(self) -> None:
        settings = self.plan.settings
        self.gates = new_gates(settings.gates(), len(settings.steps), settings.alpha)
        self.shares = EventCounts(1.0, _SHARE_RATIOS, (0.0,) * len(_SHARE_RATIOS))
        self.shadow = MeanAbove(settings.shadow_budget, mixture_rho(_SHADOW_ALPHA, _SHADOW_EFFECT))

    def add(self, records: Iterable[BlockRecord]) -> None:
        """Add blocks; those that are known already are skipped."""
        for record in records:
            if (record.worker, record.block) in self._seen:
                continue
            self._seen.add((record.worker, record.block))
            evidence = read_block(record.document, self.plan.settings.weights)
            self._add_shadow(evidence.shadow)
            for step, block in evidence.steps:
                while self._step < step:
                    self.gates, self._step = begin_step(self.gates), self._step + 1
                self.gates = observe(self.gates, block)
                drawn, stable = block.canary.conversations, block.stable.conversations
                self.shares = with_events(self.shares, drawn, stable, block.weight)
                self.canary, self.stable = self.canary + drawn, self.stable + stable
                self.canary_by_step[step] = self.canary_by_step.get(step, 0) + drawn
                if drawn:
                    self.progress_at = max(self.progress_at, record.at)

    def _add_shadow(self, answers: Iterable[tuple[float, float, float]]) -> None:
        for difference, agreement, old_agreement in answers:
            self.shadow = replace(self.shadow, values=with_value(self.shadow.values, difference))
            self.agreement += agreement
            self.old_agreement += old_agreement
            # Once it has failed, it stays so, as a gate does.
            self.shadow_failed = self.shadow_failed or self.shadow.log_e >= -math.log(_SHADOW_ALPHA)

    @property
    def shadow_verdict(self) -> Verdict:
        """What shadowed answers say: enough of them pass if their mean is within the budget; above it, more decide."""
        if self.shadow_failed:
            return "fail"
        values = self.shadow.values
        enough = values.count >= self.plan.settings.shadow_requests and values.mean <= self.shadow.budget
        return "pass" if enough else "more"

    @property
    def verdict(self) -> Verdict:
        """What all gates say."""
        return verdict(self.gates) if self.gates else "pass"

    @property
    def mismatch(self) -> str:
        """Why the shares of conversations cannot be those of the lottery; empty if they can."""
        if self.shares.log_e < -math.log(_SHARE_ALPHA):
            return ""
        shares = ", ".join(f"{weight:.3g}" for weight in self.plan.settings.weights)
        return f"{self.canary} of {self.canary + self.stable} conversations were the canary's, at shares of {shares}"

    @property
    def failure(self) -> str:
        """The gates that failed, with their figures; shadowing is one of them."""
        failed = [describe(gate) for gate in self.gates if gate.verdict == "fail"]
        return "; ".join([*failed, self.describe_shadow()] if self.shadow_failed else failed)

    def describe_shadow(self) -> str:
        """What shadowed answers show, for people."""
        values, count = self.shadow.values, max(self.shadow.values.count, 1)
        shares = (
            f"first choice {self.agreement / count:.1%}, of the old variant itself {self.old_agreement / count:.1%}"
        )
        return (
            f"shadow: {values.mean:.4f} nats per token further from the old variant than that itself, the budget is "
            f"{self.shadow.budget:g}; {shares}; {values.count} answers"
        )


@dataclass(frozen=True, slots=True)
class FailedStarts:
    """How often each replica of a variant has failed, or has gone, while it started, and why the last one did.

    `pending` are those that were starting at the last look. A replica that another program runs (`url`) is waited for.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    reason: str = "its replica was stopped while it started"
    pending: frozenset[str] = frozenset()

    @property
    def most(self) -> int:
        """The count of the replica that failed most often."""
        return max(self.counts.values(), default=0)

    def after(self, replicas: Iterable[ReplicaStatus]) -> "FailedStarts":
        """Return the counts after another look at the variant's replicas."""
        states = {status.replica.id: status for status in replicas}
        over = [name for name in self.pending if name not in states or states[name].state is State.FAILED]
        reasons = [states[name].reason for name in over if name in states]
        return FailedStarts(
            {**self.counts, **{name: self.counts.get(name, 0) + 1 for name in over}},
            reasons[-1] if reasons else self.reason,
            frozenset(name for name, status in states.items() if status.state in PENDING),
        )


NO_FAILED_STARTS = FailedStarts()


@dataclass(frozen=True, slots=True)
class Facts:
    """What a driver knows besides the evidence.

    `problems` is the result of the check that belongs to the phase (preflight, smoke): None while it runs.
    `lost_seconds` is how long the new variant has had no ready replica, `drained` whether the leaving one is idle.
    """

    ready: Readiness
    problems: tuple[str, ...] | None = None
    lost_seconds: float = 0.0
    drained: bool = False
    starts: FailedStarts = NO_FAILED_STARTS  # of the new variant's replicas


_CHECKED = {Phase.PREFLIGHT: Event.VERIFIED, Phase.SMOKE: Event.CHECKED}


def next_event(
    state: RolloutState, plan: RolloutPlan, progress: Progress, facts: Facts, now: float
) -> tuple[Event, str] | None:
    """Return what happens to a rollout now, and why; None: nothing does. The fail check comes first, in every phase."""
    if state.phase in FINAL:
        return None
    if why := _failed(state, plan, progress, facts):
        return Event.FAILED, why
    found = _checked(state, facts) or _shadowed(state, progress) or _moved(state, plan, progress, facts, now)
    if found is None and now >= deadline(state, plan):
        return Event.DEADLINE, f"nothing has ended the phase {state.phase.value} in time"
    return found


def _failed(state: RolloutState, plan: RolloutPlan, progress: Progress, facts: Facts) -> str:
    if state.failure or not carries_traffic(state) or state.phase is Phase.HOLDING:
        return ""
    if facts.lost_seconds >= LOST_SECONDS:
        return f"{plan.new} has had no ready replica for {facts.lost_seconds:.0f} s"
    return progress.failure if plan.settings.compare else ""


def _checked(state: RolloutState, facts: Facts) -> tuple[Event, str] | None:
    event = _CHECKED.get(state.phase)
    if event is None or facts.problems is None:
        return None
    return (Event.FAILED, "; ".join(facts.problems)) if facts.problems else (event, "all checks passed")


def _shadowed(state: RolloutState, progress: Progress) -> tuple[Event, str] | None:
    if state.phase is not Phase.SHADOW or progress.shadow_verdict == "more":
        return None
    event = Event.CHECKED if progress.shadow_verdict == "pass" else Event.FAILED
    return event, progress.describe_shadow()


def _moved(
    state: RolloutState, plan: RolloutPlan, progress: Progress, facts: Facts, now: float
) -> tuple[Event, str] | None:
    match state.phase:
        case Phase.STARTING if facts.ready.new:
            return Event.READY, f"{plan.new} has a ready, verified replica"
        case Phase.STARTING if facts.starts.most >= FAILED_STARTS:
            return Event.FAILED, f"{plan.new} does not start: {facts.starts.reason}"
        case Phase.CANARY:
            return _canary(state, plan, progress, now)
        case Phase.HOLDING if facts.ready.old:
            return Event.OLD_READY, f"{plan.old} is ready again"
        case Phase.ROLLING_BACK if facts.drained and now - state.since >= SETTLE_SECONDS:
            return Event.DRAINED, f"{plan.new} has no more requests"
    return None


def _canary(state: RolloutState, plan: RolloutPlan, progress: Progress, now: float) -> tuple[Event, str] | None:
    if why := progress.mismatch:
        return Event.MISMATCH, f"sample-ratio mismatch: {why}"
    if state.step + 1 >= len(plan.settings.steps) and plan.settings.weights[state.step] == 1:
        done = now - state.step_since >= plan.settings.step_seconds
        return (Event.PASSED, "every conversation used the new variant for one step") if done else None
    missing = missing_for_step(state, plan, progress, now)
    if not missing:
        last = state.step + 1 >= len(plan.settings.steps)
        return (Event.PASSED if last else Event.STEP_DONE), _figures(progress)
    if is_stalled(state, plan, progress.progress_at, now):
        return Event.STALLED, f"no new conversations of the canary: {missing}"
    return None


def missing_for_step(state: RolloutState, plan: RolloutPlan, progress: Progress, now: float) -> str:
    """What a step waits for; empty if it is complete.

    The last step with two arms waits until every gate has passed: without a comparison nothing is promoted.
    """
    settings = plan.settings
    drawn = progress.canary_by_step.get(state.step, 0)
    if drawn < settings.min_conversations:
        return f"{settings.min_conversations - drawn} more conversations of the canary in this step"
    is_last = state.step + 1 >= len(settings.steps) or settings.weights[state.step + 1] == 1
    if is_last and settings.compare and progress.verdict != "pass":
        needed = max(gate.needed_conversations() for gate in progress.gates if gate.verdict == "more")
        return f"{needed if needed < MAX_NEEDED else 'many'} more conversations of the canary for the gates"
    left = settings.step_seconds - (now - state.step_since)
    return f"{left:.0f} more seconds" if left > 0 else ""


def missing_for_shadow(plan: RolloutPlan, progress: Progress) -> str:
    """What shadowing waits for: more answers, or such that decide while their mean is above the budget."""
    missing = plan.settings.shadow_requests - progress.shadow.values.count
    needs = f"{missing} more answers" if missing > 0 else "answers that decide whether the mean is above the budget"
    return f"{needs}; {progress.describe_shadow()}"


def describe(gate: Gate) -> str:
    """A gate with its figures, for people."""
    settings = gate.settings
    odds = f"evidence {_odds(gate.log_e)} of {_odds(-math.log(gate.alpha))}"
    if isinstance(gate, EventGate):
        (events, of), (stable_events, stable_of) = gate.canary, gate.stable
        return f"{settings.name}: canary {events} of {of}, stable {stable_events} of {stable_of}, {odds}"
    bounds = gate.interval
    if bounds is None:
        return f"{settings.name}: no figures yet, {odds}"
    low, middle, high = bounds
    return f"{settings.name}: canary / stable {middle:.3f} ({low:.3f} to {high:.3f}), {odds}"


def _odds(log_e: float) -> str:
    return f"{math.exp(min(log_e, 20.0)):.3g}"


def _figures(progress: Progress) -> str:
    return f"{progress.canary} conversations of the canary, {progress.stable} of the stable variant; no gate failed"
