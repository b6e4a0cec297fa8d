"""The states of a rollout: every phase with every event, deadlines, and what an alias uses meanwhile."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.rollout.machine import (
    FINAL,
    START,
    Event,
    Phase,
    Readiness,
    Refused,
    RolloutState,
    Split,
    advance,
    carries_traffic,
    deadline,
    is_stalled,
    split,
)
from tests.gateway.rollout.plans import NOW, plan

READY, OLD_AWAY, NEW_AWAY = (
    Readiness(old=True, new=True),
    Readiness(old=False, new=True),
    Readiness(old=True, new=False),
)
PLAN = plan(shadow=0.02)

# Rows: phases; columns: events. A dot: refused. States are in step 0 of 5, both variants are ready, and a failure rolls
# back. `paused` has interrupted `canary`.
PROGRESS = """
             verified ready checked step_done passed
preflight    starting .     .       .         .
starting     .        smoke .       .         .
smoke        .        .     shadow  .         .
shadow       .        .     canary  .         .
canary       .        .     .       canary    draining
paused       .        .     .       .         .
holding      .        .     .       .         .
draining     .        .     .       .         .
keeping      .        .     .       .         .
rolling_back .        .     .       .         .
done         .        .     .       .         .
rolled_back  .        .     .       .         .
failed       .        .     .       .         .
"""
TROUBLE = """
             failed       mismatch stalled old_ready    drained     deadline
preflight    failed       .        .       .            .           failed
starting     rolling_back .        .       .            .           rolling_back
smoke        rolling_back .        .       .            .           rolling_back
shadow       rolling_back .        .       .            .           paused
canary       rolling_back paused   paused  .            .           paused
paused       rolling_back .        .       .            .           rolling_back
holding      .            .        .       rolling_back .           holding
draining     rolling_back .        .       .            keeping     keeping
keeping      rolling_back .        .       .            .           done
rolling_back .            .        .       .            rolled_back rolled_back
done         .            .        .       .            .           .
rolled_back  .            .        .       .            .           .
failed       .            .        .       .            .           .
"""
OPERATORS = """
             pause  resume promote promote_full abort        undo
preflight    paused .      .       draining     failed       .
starting     paused .      .       draining     rolling_back .
smoke        paused .      .       draining     rolling_back .
shadow       paused .      canary  draining     rolling_back .
canary       paused .      canary  draining     rolling_back .
paused       .      canary canary  draining     rolling_back .
holding      .      .      .       draining     .            .
draining     .      .      .       .            rolling_back rolling_back
keeping      .      .      .       .            rolling_back rolling_back
rolling_back .      .      .       .            .            .
done         .      .      .       .            .            .
rolled_back  .      .      .       .            .            .
failed       .      .      .       .            .            .
"""


def cells(table: str) -> list[tuple[Phase, Event, str]]:
    """The cells of a table."""
    head, *rows = table.strip("\n").splitlines()
    return [
        (Phase(name), Event(event), cell)
        for name, *row in (line.split() for line in rows)
        for event, cell in zip(head.split(), row, strict=True)
    ]


CELLS = [*cells(PROGRESS), *cells(TROUBLE), *cells(OPERATORS)]


def state(phase: Phase, **fields: object) -> RolloutState:
    """A state that began now."""
    before = Phase.CANARY if phase is Phase.PAUSED else None
    began = RolloutState(phase, since=NOW, step_since=NOW, before=before)
    return replace(began, **fields)  # type: ignore[arg-type]


def test_the_tables_have_every_pair() -> None:
    """None is forgotten when a phase or an event is added."""
    assert {(phase, event) for phase, event, _ in CELLS} == {(phase, event) for phase in Phase for event in Event}


@pytest.mark.parametrize("phase, event, expected", CELLS)
def test_every_pair(phase: Phase, event: Event, expected: str) -> None:
    """An event leads where the table says, or is refused and changes nothing."""
    if expected == ".":
        with pytest.raises(Refused, match=r"not possible in phase|has not been checked"):
            advance(state(phase), event, "why", PLAN, READY, NOW + 1)
        return
    after = advance(state(phase), event, "why", PLAN, READY, NOW + 1)
    assert after.phase == expected
    assert after.since == NOW + 1


@pytest.mark.parametrize("phase", list(Phase))
def test_every_phase_ends(phase: Phase) -> None:
    """Each has a deadline that leads elsewhere, or an alarm and a way out for operators; a final one has none."""
    began = state(phase)
    if phase in FINAL:
        assert deadline(began, PLAN) == inf
        return
    assert NOW < deadline(began, PLAN) < NOW + 2 * 86400
    after = advance(began, Event.DEADLINE, "too late", PLAN, READY, NOW + 1)
    assert after.phase is not phase or (after.stuck and phase is Phase.HOLDING)


@given(st.lists(st.tuples(st.sampled_from(Event), st.booleans(), st.booleans()), max_size=30))
def test_deadlines_lead_to_an_end(events: list[tuple[Event, bool, bool]]) -> None:
    """Whatever happened, once both variants are ready deadlines alone end a rollout, and an end has no way back."""
    now, current = NOW, START
    for event, old, new in events:
        now += 1
        try:
            current = advance(current, event, "why", PLAN, Readiness(old, new), now)
        except Refused:
            continue
        assert not (current.phase is Phase.ROLLING_BACK and carries_traffic(current))
    for _ in range(12):
        if current.phase in FINAL:
            break
        event = Event.OLD_READY if current.phase is Phase.HOLDING else Event.DEADLINE
        current = advance(current, event, "too late", PLAN, READY, now)
    assert current.phase in FINAL


# A failure


@pytest.mark.parametrize("phase", [Phase.CANARY, Phase.PAUSED, Phase.DRAINING, Phase.KEEPING])
def test_no_way_back_without_the_old_variant(phase: Phase) -> None:
    """While it is not ready, a failure changes no weight: it holds, says so, and goes back as soon as that is safe."""
    began = state(phase, step=1, promoted=phase in (Phase.DRAINING, Phase.KEEPING))
    held = advance(began, Event.FAILED, "errors", PLAN, OLD_AWAY, NOW)
    assert (held.phase, held.failure) == (Phase.HOLDING, "errors")
    assert split(held, PLAN).weight == (1.0 if held.promoted else 0.05)
    late = advance(held, Event.DEADLINE, "too late", PLAN, OLD_AWAY, NOW + 1000)
    assert (late.phase, late.stuck, deadline(late, PLAN)) == (Phase.HOLDING, True, NOW + 1900)
    back = advance(late, Event.OLD_READY, "old is ready", PLAN, READY, NOW + 1001)
    assert (back.phase, back.failure, back.stuck) == (Phase.ROLLING_BACK, "errors", False)
    assert split(back, PLAN) == Split(PLAN.stable)


def test_before_any_traffic_it_goes_back_whatever_is_ready() -> None:
    """Nothing has changed for clients yet."""
    after = advance(state(Phase.SMOKE), Event.FAILED, "endless", PLAN, OLD_AWAY, NOW)
    assert (after.phase, after.failure) == (Phase.ROLLING_BACK, "endless")


def test_a_failure_may_freeze_instead() -> None:
    """`on_fail: pause` keeps the weight; it is told once, and only `promote --full` or `abort` lead on."""
    freezing = plan(on_fail="pause")
    paused = advance(state(Phase.CANARY, step=2), Event.FAILED, "slow", freezing, READY, NOW)
    assert (paused.phase, paused.pause, paused.failure) == (Phase.PAUSED, "slow", "slow")
    assert split(paused, freezing).weight == 0.25
    for event in (Event.FAILED, Event.RESUME, Event.PROMOTE):
        with pytest.raises(Refused):
            advance(paused, event, "", freezing, READY, NOW)
    assert advance(paused, Event.PROMOTE_FULL, "", freezing, READY, NOW).phase is Phase.DRAINING
    assert advance(paused, Event.ABORT, "", freezing, READY, NOW).phase is Phase.ROLLING_BACK


def test_past_promotion_a_failure_does_not_freeze() -> None:
    """Waiting there means that everybody waits."""
    after = advance(state(Phase.KEEPING), Event.FAILED, "errors", plan(on_fail="pause"), READY, NOW)
    assert after.phase is Phase.ROLLING_BACK


def test_full_promotion_needs_the_new_variant() -> None:
    """It skips gates, not the question who answers."""
    with pytest.raises(Refused, match="new has no ready replica"):
        advance(state(Phase.CANARY), Event.PROMOTE_FULL, "", PLAN, NEW_AWAY, NOW)
    assert advance(state(Phase.CANARY), Event.PROMOTE_FULL, "", PLAN, OLD_AWAY, NOW).phase is Phase.DRAINING


def test_an_operator_s_reason_is_recorded() -> None:
    """An abort is told apart from a failed gate."""
    after = advance(state(Phase.CANARY), Event.ABORT, "wrong variant", PLAN, READY, NOW)
    assert after.failure == "abort: wrong variant"


# Steps and pauses


def test_the_steps() -> None:
    """Each has its weight; the last one leads to promotion."""
    current, weights = state(Phase.SHADOW), []
    for event in (Event.CHECKED, *[Event.STEP_DONE] * 4):
        current = advance(current, event, "", PLAN, READY, NOW)
        weights.append(split(current, PLAN).weight)
    assert weights == [0.01, 0.05, 0.25, 0.5, 1.0]
    promoted = advance(current, Event.PROMOTE, "", PLAN, READY, NOW)
    assert promoted.phase is Phase.DRAINING
    assert split(promoted, PLAN) == Split(("old", "new", "low"), ("new", "old", "low"), 1.0, 4)
    assert split(advance(promoted, Event.DRAINED, "", PLAN, READY, NOW), PLAN) == Split(("new", "low"))


@pytest.mark.parametrize("phase", [Phase.PREFLIGHT, Phase.STARTING, Phase.SMOKE, Phase.SHADOW, Phase.CANARY])
def test_a_pause_keeps_everything(phase: Phase) -> None:
    """Weight and step stay, and it goes on in the same phase."""
    began = state(phase, step=2 if phase is Phase.CANARY else 0)
    paused = advance(began, Event.PAUSE, "lunch", PLAN, READY, NOW + 1)
    assert (paused.phase, paused.pause, paused.failure) == (Phase.PAUSED, "lunch", "")
    assert split(paused, PLAN) == split(began, PLAN)
    resumed = advance(paused, Event.RESUME, "", PLAN, READY, NOW + 2)
    assert (resumed.phase, resumed.step, resumed.pause, resumed.before) == (phase, began.step, "", None)


def test_promotion_out_of_a_pause() -> None:
    """It begins the step after the one that was interrupted; a variant that was not checked is not promoted."""
    paused = advance(state(Phase.CANARY, step=1), Event.STALLED, "no data", PLAN, READY, NOW)
    assert advance(paused, Event.PROMOTE, "", PLAN, READY, NOW).step == 2
    early = advance(state(Phase.STARTING), Event.PAUSE, "", PLAN, READY, NOW)
    with pytest.raises(Refused, match="has not been checked"):
        advance(early, Event.PROMOTE, "", PLAN, READY, NOW)


def test_stalled() -> None:
    """A step without a new conversation for ten minutes; other phases don't stall."""
    began = state(Phase.CANARY)
    assert not is_stalled(began, PLAN, 0.0, NOW + 599)
    assert is_stalled(began, PLAN, 0.0, NOW + 600)
    assert not is_stalled(began, PLAN, NOW + 500, NOW + 600)
    assert not is_stalled(state(Phase.SHADOW), PLAN, 0.0, NOW + 10_000)


@pytest.mark.parametrize("phase", [Phase.PREFLIGHT, Phase.STARTING, Phase.SMOKE, Phase.SHADOW])
def test_no_conversation_before_the_canary(phase: Phase) -> None:
    """Conversations are recorded from the beginning, and none is drawn to the new variant; one phase shadows."""
    shadow = 0.02 if phase is Phase.SHADOW else 0.0
    assert split(state(phase), PLAN) == Split(("old", "low"), ("new", "old", "low"), 0.0, 0, shadow)
