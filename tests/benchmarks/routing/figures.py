"""What a run came to, in figures: arithmetic over outcomes, the same for the simulator and for sockets."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tests.benchmarks.overhead.figures import percentile
from tests.benchmarks.routing.runs import Outcome, Run

WINDOW_SECONDS = 5.0  # the alias answers with the rung that took most turns in such a window
NONE = float("nan")


@dataclass(frozen=True, slots=True)
class Objective:
    """What makes an answer good: its first token in time, and the mean time from token to token."""

    first_token_seconds: float = 2.0
    inter_token_seconds: float = 0.1


@dataclass(frozen=True, slots=True)
class Figures:
    """One policy in one scenario; `nan` where there was nothing to count.

    Waits count from when a turn was first asked, refusals included. `good` are the answers that meet the objective: a
    share of all turns, and a rate; of those `in_time` the first token does. `agreement` is the mean top1_agreement of
    the variants that answered, over answers. `session_switches` are changes of variant from a turn to the next, per
    conversation that had a next one; `changed_share` is the share of next turns with such a change. `window_switches`
    are a minute's changes of the rung that took most turns in a window; `alias_switches` those that the policy itself
    told. `spread` is the most turns sent to one replica by the mean, in each rung; the worst rung's.
    `retry_error_seconds`: of refusals, what Retry-After told less the time until the turn would have been taken had
    it asked all the time (looked at four times a second), median; `retry_error_p95_seconds` is of its absolute value.
    """

    policy: str
    turns: int
    answered: int
    failed: int
    refused: int
    first_token_p50: float
    first_token_p95: float
    first_token_p99: float
    good_share: float
    in_time_share: float
    good_per_second: float
    agreement: float
    good_agreement: float
    shares: Mapping[str, float]
    session_switches: float
    changed_share: float
    window_switches: float
    alias_switches: float
    retry_error_seconds: float
    retry_error_p95_seconds: float
    spread: float
    hit_share: float
    preemptions: int
    below_floor: int


def figures_of(run: Run, objective: Objective) -> Figures:
    """Count what a run came to."""
    outcomes, seconds = run.outcomes, run.scenario.seconds
    begun = [outcome for outcome in outcomes if outcome.first_at is not None]
    waits = [wait_seconds(outcome) for outcome in begun]
    good = [outcome for outcome in begun if is_good(outcome, objective)]
    errors = [
        refusal.told_seconds - refusal.really_seconds
        for outcome in outcomes
        for refusal in outcome.refusals
        if refusal.really_seconds is not None
    ]
    changes, next_turns, conversations = _changes(begun)
    p50, p95, p99 = (percentile(waits, percent) if waits else NONE for percent in (50, 95, 99))
    return Figures(
        policy=run.policy,
        turns=len(outcomes),
        answered=sum(outcome.ended_at is not None for outcome in outcomes),
        failed=sum(outcome.failed for outcome in outcomes),
        refused=sum(len(outcome.refusals) for outcome in outcomes),
        first_token_p50=p50,
        first_token_p95=p95,
        first_token_p99=p99,
        good_share=len(good) / max(len(outcomes), 1),
        in_time_share=sum(wait <= objective.first_token_seconds for wait in waits) / max(len(outcomes), 1),
        good_per_second=len(good) / seconds,
        agreement=_mean(outcome.agreement for outcome in begun),
        good_agreement=_mean(outcome.agreement for outcome in good),
        shares=shares(begun, run.scenario.fleet.rungs),
        session_switches=changes / max(conversations, 1),
        changed_share=changes / max(next_turns, 1),
        window_switches=_window_switches(begun, run.scenario.fleet.rungs) * 60 / seconds,
        alias_switches=len(run.switches) * 60 / seconds,
        retry_error_seconds=statistics.median(errors) if errors else NONE,
        retry_error_p95_seconds=percentile(map(abs, errors), 95) if errors else NONE,
        spread=_spread(run),
        hit_share=run.hit_share,
        preemptions=run.preemptions,
        below_floor=sum(outcome.turn.floor is not None and outcome.agreement < outcome.turn.floor for outcome in begun),
    )


def wait_seconds(outcome: Outcome) -> float:
    """From asking for the first time to the first token."""
    assert outcome.first_at is not None
    return outcome.first_at - outcome.asked_at


def is_good(outcome: Outcome, objective: Objective) -> bool:
    """Tell whether a turn was answered as it should be."""
    if outcome.first_at is None or outcome.ended_at is None or outcome.failed:
        return False
    gaps = max(outcome.turn.answer_tokens - 1, 1)
    return (
        wait_seconds(outcome) <= objective.first_token_seconds
        and (outcome.ended_at - outcome.first_at) / gaps <= objective.inter_token_seconds
    )


def shares(outcomes: Sequence[Outcome], rungs: Sequence[str]) -> dict[str, float]:
    """Which precision answered how much."""
    counts = Counter(outcome.precision for outcome in outcomes)
    return {rung: counts[rung] / max(len(outcomes), 1) for rung in rungs}


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.fmean(found) if found else NONE


def _changes(outcomes: Sequence[Outcome]) -> tuple[int, int, int]:
    """Count the changes of variant, the turns that had one before them, and the conversations of such turns."""
    sessions = defaultdict[str, list[Outcome]](list)
    for outcome in outcomes:
        sessions[outcome.turn.session].append(outcome)
    longer = [sorted(turns, key=lambda outcome: outcome.turn.number) for turns in sessions.values() if len(turns) > 1]
    changes = sum(before.precision != after.precision for turns in longer for before, after in pairwise(turns))
    return changes, sum(len(turns) - 1 for turns in longer), len(longer)


def _window_switches(outcomes: Sequence[Outcome], rungs: Sequence[str]) -> int:
    windows = defaultdict[int, Counter[str]](Counter)
    for outcome in outcomes:
        assert outcome.sent_at is not None
        windows[int(outcome.sent_at / WINDOW_SECONDS)][outcome.precision] += 1
    most = [max(rungs, key=windows[number].__getitem__) for number in sorted(windows)]
    return sum(before != after for before, after in pairwise(most))


def _spread(run: Run) -> float:
    sent = Counter(outcome.replica for outcome in run.outcomes if outcome.replica)
    worst = 1.0
    for rung in run.scenario.fleet.rungs:
        counts = [sent[member.id] for member in run.scenario.fleet.only(rung).members]
        if sum(counts):
            worst = max(worst, max(counts) * len(counts) / sum(counts))
    return worst
