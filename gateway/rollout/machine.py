"""The states of a rollout, and what moves it from one to the next. Pure: time and facts come in as arguments.

`fail` is one decision in every state: roll back if the old variant is ready now, else hold; `pause` with `on_fail:
pause`. Past promotion, back means the other way: the new variant answers until the old one is ready.

============  ======================================================================================================
phase         event -> next phase
============  ======================================================================================================
preflight     verified -> starting; failed, deadline, abort -> failed
starting      ready -> smoke; failed, deadline, abort -> rolling_back
smoke         checked -> shadow, or canary without shadowing; failed, deadline -> fail; abort -> rolling_back
shadow        checked, promote -> canary; failed -> fail; deadline -> paused; abort -> rolling_back
canary        step_done, promote -> canary, next step; passed, promote (last step) -> draining; failed -> fail;
              mismatch, stalled, deadline -> paused; abort -> fail
paused        resume -> the phase before; promote -> the one after that; failed -> fail, unless it paused for that;
              deadline, abort -> fail
holding       old_ready -> rolling_back; deadline -> holding (`stuck`, the alarm repeats)
draining      drained, deadline -> keeping; failed, abort, undo -> fail
keeping       deadline -> done; failed, abort, undo -> fail
rolling_back  drained, deadline -> rolled_back
============  ======================================================================================================

`pause` leads from preflight, starting, smoke, shadow and canary to paused. `promote_full` leads from every phase before
draining to draining, without gates, if the new variant is ready. Every other pair is refused (`Refused`). `done`,
`rolled_back` and `failed` are final: another rollout of the alias may start.

What an alias uses is a function of the state, too (`split`), so that a driver that takes over sets what its predecessor
would have set.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf
from types import MappingProxyType

from gateway.rollout.plan import PlanSettings, RolloutPlan


class Phase(StrEnum):
    """Where a rollout is."""

    PREFLIGHT = "preflight"
    STARTING = "starting"
    SMOKE = "smoke"
    SHADOW = "shadow"
    CANARY = "canary"
    PAUSED = "paused"
    HOLDING = "holding"
    DRAINING = "draining"
    KEEPING = "keeping"
    ROLLING_BACK = "rolling_back"
    DONE = "done"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"


FINAL = frozenset({Phase.DONE, Phase.ROLLED_BACK, Phase.FAILED})
_LOST = frozenset({Phase.HOLDING, Phase.ROLLING_BACK, Phase.ROLLED_BACK, Phase.FAILED})
PROMOTED = frozenset({Phase.DRAINING, Phase.KEEPING, Phase.DONE})


class Event(StrEnum):
    """What happens to a rollout: found by its driver, or wanted by an operator (the last six)."""

    VERIFIED = "verified"
    READY = "ready"
    CHECKED = "checked"
    STEP_DONE = "step_done"
    PASSED = "passed"
    FAILED = "failed"
    MISMATCH = "mismatch"
    STALLED = "stalled"
    OLD_READY = "old_ready"
    DRAINED = "drained"
    DEADLINE = "deadline"
    PAUSE = "pause"
    RESUME = "resume"
    PROMOTE = "promote"
    PROMOTE_FULL = "promote_full"
    ABORT = "abort"
    UNDO = "undo"


OPERATOR = frozenset({Event.PAUSE, Event.RESUME, Event.PROMOTE, Event.PROMOTE_FULL, Event.ABORT, Event.UNDO})


class Refused(Exception):
    """An event that has no meaning in a phase, or whose condition is not met; the message says which."""


@dataclass(frozen=True, slots=True)
class Preconditions:
    """What a command was chosen for: the rollout's id, and its phase and step then. None: any."""

    rollout: str | None = None
    phase: Phase | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True)
class RolloutState:
    """The state of a rollout.

    `since` is when the phase began, `step_since` when the step did, in seconds since 1970. `failure` is why it failed,
    `pause` why it is paused; `before` is the phase that a pause interrupted. `promoted`: every new conversation uses
    the new variant. `stuck` is set while a deadline has passed and nothing but an operator helps.
    """

    phase: Phase = Phase.PREFLIGHT
    since: float = 0.0
    step: int = 0
    step_since: float = 0.0
    failure: str = ""
    pause: str = ""
    before: Phase | None = None
    promoted: bool = False
    stuck: bool = False


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the variants have a ready replica of the plan's content now."""

    old: bool
    new: bool


@dataclass(frozen=True, slots=True)
class Split:
    """How an alias divides its conversations: a share of `weight` uses the canary's ladder, in a step.

    `canary` None: there is one ladder, and no draw. A share of `shadow` of the old variant's answers is scored.
    """

    stable: tuple[str, ...]
    canary: tuple[str, ...] | None = None
    weight: float = 0.0
    step: int = 0
    shadow: float = 0.0


START = RolloutState()
ANY = Preconditions()
# Phases by the plain event that leads there; what depends on more is in `_next`.
_PLAIN: Mapping[tuple[Phase, Event], Phase] = MappingProxyType(
    {
        (Phase.PREFLIGHT, Event.VERIFIED): Phase.STARTING,
        (Phase.PREFLIGHT, Event.FAILED): Phase.FAILED,
        (Phase.PREFLIGHT, Event.DEADLINE): Phase.FAILED,
        (Phase.PREFLIGHT, Event.ABORT): Phase.FAILED,
        (Phase.STARTING, Event.READY): Phase.SMOKE,
        (Phase.STARTING, Event.FAILED): Phase.ROLLING_BACK,
        (Phase.STARTING, Event.DEADLINE): Phase.ROLLING_BACK,
        (Phase.STARTING, Event.ABORT): Phase.ROLLING_BACK,
        (Phase.SMOKE, Event.ABORT): Phase.ROLLING_BACK,
        (Phase.SHADOW, Event.CHECKED): Phase.CANARY,
        (Phase.SHADOW, Event.PROMOTE): Phase.CANARY,
        (Phase.SHADOW, Event.DEADLINE): Phase.PAUSED,
        (Phase.SHADOW, Event.ABORT): Phase.ROLLING_BACK,
        (Phase.CANARY, Event.STEP_DONE): Phase.CANARY,
        (Phase.CANARY, Event.PASSED): Phase.DRAINING,
        (Phase.CANARY, Event.MISMATCH): Phase.PAUSED,
        (Phase.CANARY, Event.STALLED): Phase.PAUSED,
        (Phase.CANARY, Event.DEADLINE): Phase.PAUSED,
        (Phase.HOLDING, Event.OLD_READY): Phase.ROLLING_BACK,
        (Phase.HOLDING, Event.DEADLINE): Phase.HOLDING,
        (Phase.DRAINING, Event.DRAINED): Phase.KEEPING,
        (Phase.DRAINING, Event.DEADLINE): Phase.KEEPING,
        (Phase.KEEPING, Event.DEADLINE): Phase.DONE,
        (Phase.ROLLING_BACK, Event.DRAINED): Phase.ROLLED_BACK,
        (Phase.ROLLING_BACK, Event.DEADLINE): Phase.ROLLED_BACK,
        **{
            (phase, Event.PAUSE): Phase.PAUSED
            for phase in (Phase.PREFLIGHT, Phase.STARTING, Phase.SMOKE, Phase.SHADOW, Phase.CANARY)
        },
    }
)
# Pairs that lead back, or hold where nothing else could answer. An operator who gives up does not ask for a pause.
_FAILS = frozenset(
    {
        *((phase, Event.FAILED) for phase in (Phase.SMOKE, Phase.SHADOW, Phase.CANARY, Phase.PAUSED)),
        *((phase, Event.ABORT) for phase in (Phase.CANARY, Phase.PAUSED, Phase.DRAINING, Phase.KEEPING)),
        *((phase, event) for phase in (Phase.DRAINING, Phase.KEEPING) for event in (Event.FAILED, Event.UNDO)),
        (Phase.SMOKE, Event.DEADLINE),
        (Phase.PAUSED, Event.DEADLINE),
    }
)
_BEFORE_PROMOTION = (
    *(Phase.PREFLIGHT, Phase.STARTING, Phase.SMOKE, Phase.SHADOW, Phase.CANARY, Phase.PAUSED, Phase.HOLDING),
)
_UNJUDGED = "a gate failed: `promote --full` goes on without gates, `abort` goes back"


def advance(
    state: RolloutState, event: Event, why: str, plan: RolloutPlan, ready: Readiness, now: float
) -> RolloutState:
    """Return the state after an event; Refused if it has no meaning now."""
    phase = _next(state, event, plan, ready)
    after = _step(state, event, phase, plan, now)
    if event is Event.FAILED or phase in _LOST:
        operator = f"{event.value}: " if event in OPERATOR else ""
        after = replace(after, failure=state.failure or operator + why)
    if phase is Phase.PAUSED:
        before = state.before if state.phase is Phase.PAUSED else state.phase
        return replace(after, pause=why, before=before)
    return replace(after, pause="", before=None, stuck=phase is Phase.HOLDING and event is Event.DEADLINE)


def deadline(state: RolloutState, plan: RolloutPlan) -> float:
    """When the deadline of a phase passes; inf for a final one."""
    settings = plan.settings
    if state.phase in FINAL:
        return inf
    if state.phase is Phase.CANARY:
        return state.step_since + settings.step_seconds + settings.evidence_seconds
    return state.since + _limits(settings)[state.phase]


def holds(preconditions: Preconditions, rollout: str, state: RolloutState) -> bool:
    """Whether a rollout is the one, and is where, the preconditions name."""
    expected = (preconditions.rollout, preconditions.phase, preconditions.step)
    actual = (rollout, state.phase, state.step)
    return all(wanted is None or wanted == found for wanted, found in zip(expected, actual, strict=True))


def split(state: RolloutState, plan: RolloutPlan) -> Split:
    """How the alias divides its conversations in a state."""
    phase = state.before if state.phase is Phase.PAUSED and state.before is not None else state.phase
    if phase in (Phase.KEEPING, Phase.DONE):
        return Split(plan.final)
    if phase in (Phase.FAILED, Phase.ROLLED_BACK, Phase.ROLLING_BACK):
        return Split(plan.stable)
    step = max(state.step, 0)
    if phase is Phase.DRAINING or (phase is Phase.HOLDING and state.promoted):
        # Conversations of the old variant end there; where it has no replica, the new one answers them.
        return Split(_with_fallback(plan), plan.canary, 1.0, step)
    if phase in (Phase.CANARY, Phase.HOLDING):
        shadow = plan.settings.shadow if phase is Phase.CANARY else 0.0
        return Split(plan.stable, plan.canary, _weight(state, plan), step, shadow)
    return Split(plan.stable, plan.canary, 0.0, step, plan.settings.shadow if phase is Phase.SHADOW else 0.0)


def is_stalled(state: RolloutState, plan: RolloutPlan, progress_at: float, now: float) -> bool:
    """Whether a step has had no new conversation of the canary, the last one at `progress_at`, for `stall_seconds`."""
    quiet_since = max(progress_at, state.step_since)
    return state.phase is Phase.CANARY and now - quiet_since >= plan.settings.stall_seconds


def _next(state: RolloutState, event: Event, plan: RolloutPlan, ready: Readiness) -> Phase:
    phase = state.phase
    if event is Event.PROMOTE_FULL and phase in _BEFORE_PROMOTION:
        if not ready.new:
            raise Refused(f"{plan.new} has no ready replica: nothing would answer")
        return Phase.DRAINING
    if (phase, event) in _FAILS:
        return _fail(state, event, plan, ready)
    if phase is Phase.SMOKE and event is Event.CHECKED:
        return Phase.SHADOW if plan.settings.shadow else Phase.CANARY
    if event is Event.PROMOTE and phase in (Phase.CANARY, Phase.PAUSED):
        return _promote(state, plan)
    if phase is Phase.PAUSED and event is Event.RESUME:
        if state.failure:
            raise Refused(_UNJUDGED)
        assert state.before is not None
        return state.before
    if (found := _PLAIN.get((phase, event))) is None:
        raise Refused(f"{event.value.replace('_', ' ')}: not possible in phase {phase.value}")
    return found


def _fail(state: RolloutState, event: Event, plan: RolloutPlan, ready: Readiness) -> Phase:
    """Back, if that helps: before any traffic at once, else only to a variant that is ready now."""
    if event is Event.FAILED and plan.settings.on_fail == "pause" and state.phase not in PROMOTED:
        if state.failure:
            raise Refused("it is paused for a failure already")
        return Phase.PAUSED
    if not carries_traffic(state) or ready.old:
        return Phase.ROLLING_BACK
    if event is Event.UNDO:
        raise Refused(f"{plan.old} has no ready replica: nothing would answer")
    return Phase.HOLDING


def carries_traffic(state: RolloutState) -> bool:
    """Whether conversations may use the new variant in a state."""
    phase = state.before if state.phase is Phase.PAUSED else state.phase
    return phase in (Phase.CANARY, Phase.HOLDING, Phase.DRAINING, Phase.KEEPING)


def _promote(state: RolloutState, plan: RolloutPlan) -> Phase:
    if state.failure:
        raise Refused(_UNJUDGED)
    phase = state.before if state.phase is Phase.PAUSED else state.phase
    if phase is Phase.CANARY:
        return Phase.DRAINING if state.step + 1 >= len(plan.settings.steps) else Phase.CANARY
    if phase is Phase.SHADOW:
        return Phase.CANARY
    raise Refused(f"promote: {plan.new} has not been checked yet; `resume` goes on")


def _step(state: RolloutState, event: Event, phase: Phase, plan: RolloutPlan, now: float) -> RolloutState:
    """The phase with its times; a step begins with the canary, and with each further step."""
    if phase is not Phase.CANARY:
        return replace(state, phase=phase, since=now, promoted=state.promoted or phase is Phase.DRAINING)
    began = Phase.CANARY in (state.phase, state.before)
    step = state.step if not began else min(state.step + (event is not Event.RESUME), len(plan.settings.steps) - 1)
    return replace(state, phase=phase, since=now, step=step, step_since=now)


def _weight(state: RolloutState, plan: RolloutPlan) -> float:
    return plan.settings.weights[state.step]


def _with_fallback(plan: RolloutPlan) -> tuple[str, ...]:
    ladder = list(plan.stable)
    if not plan.added:
        return plan.stable
    ladder.insert(ladder.index(plan.old) + 1 if plan.old in ladder else len(ladder), plan.new)
    return tuple(ladder)


def _limits(settings: PlanSettings) -> dict[Phase, float]:
    return {
        Phase.PREFLIGHT: settings.preflight_seconds,
        Phase.STARTING: settings.start_seconds,
        Phase.SMOKE: settings.smoke_seconds,
        Phase.SHADOW: settings.shadow_seconds,
        Phase.PAUSED: settings.pause_seconds,
        Phase.HOLDING: settings.hold_seconds,
        Phase.DRAINING: settings.drain_seconds,
        Phase.KEEPING: settings.keep,
        Phase.ROLLING_BACK: settings.drain_seconds,
    }
