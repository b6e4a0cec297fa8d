"""Breakers: when one opens, half-opens and closes, and which replicas of a variant may be asked."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.breaker import (
    DEFAULT_POLICY,
    HEALTHY,
    Breaker,
    abandoned,
    admissible,
    failed,
    in_rotation,
    probing,
    retracted,
    succeeded,
)


def after(story: str, breaker: Breaker = HEALTHY) -> Breaker:
    """Apply events, each a letter and its time in seconds, such as "F0 S3": Failure, Success, Probe, Abandoned."""
    for word in story.split():
        event, now = word[0], float(word[1:])
        if event == "F":
            breaker = failed(breaker, now)
        elif event == "S":
            breaker = succeeded(breaker, now)
        else:
            breaker = probing(breaker, now) if event == "P" else abandoned(breaker)
    return breaker


OPEN = "F0 F0 F0"
REOPENED = f"{OPEN} F1 F3 F7 F15"


@pytest.mark.parametrize(
    "story, now, state, admits",
    [
        ("", 0, "closed", True),
        ("F0 F0", 0, "closed", True),
        (OPEN, 0, "open", False),
        ("F0 F0 S0 F0 F0", 0, "closed", True),
        # A failure of 30 seconds ago does not count as consecutive.
        ("F0 F0 F30", 30, "closed", True),
        ("F0 F0 F29", 29, "open", False),
        # A failed share of half of at least ten results.
        ("F0 F0 S0 F0 F0 S0 F0 S0 S0 S0", 0, "closed", True),
        ("F0 F0 S0 F0 F0 S0 S0 S0 S0 F0", 0, "open", False),
        ("F0 S0 F0 S0 F0 S0 F0 S0", 0, "closed", True),
        ("F0 S0 F0 S0 F0 S0 F0 S0 S0 F0", 0, "open", False),
        ("F0 S0 F0 S0 F0 S0 F0 S0 S20 F20", 20, "open", False),
        ("F0 S0 F0 S0 F0 S0 F0 S0 S35 F35", 35, "closed", True),
        # Open for a second, then twice as long each time, up to 30 seconds.
        (OPEN, 0.99, "open", False),
        (OPEN, 1, "half_open", True),
        (f"{OPEN} F1", 2.99, "open", False),
        (f"{OPEN} F1", 3, "half_open", True),
        (f"{OPEN} F1 F3", 7, "half_open", True),
        (REOPENED, 30.99, "open", False),
        (f"{REOPENED} F31", 60.99, "open", False),
        (f"{REOPENED} F31", 61, "half_open", True),
        (f"{REOPENED} F31 F61", 91, "half_open", True),
        # A failure while it is open does not extend it.
        (f"{OPEN} F0.5 F0.9", 1, "half_open", True),
        # A probe keeps other requests out until it ends, is abandoned or is lost.
        (f"{OPEN} P1", 1, "half_open", False),
        (f"{OPEN} P1", 30.99, "half_open", False),
        (f"{OPEN} P1", 31, "half_open", True),
        (f"{OPEN} P1 A2", 2, "half_open", True),
        (f"{OPEN} P1 F2", 2, "open", False),
        (f"{OPEN} P1 F2", 4, "half_open", True),
        (f"{OPEN} P1 S2", 2, "closed", True),
        # An open breaker admits no probe, and a closed one needs none.
        (f"{OPEN} P0.5", 1, "half_open", True),
        ("P0", 0, "closed", True),
        # A success of a last resort closes it.
        (f"{OPEN} S0.5", 0.5, "closed", True),
        # Reopened soon, it is open twice as long; after a while, for a second again.
        (f"{OPEN} S1 F2 F2", 2, "closed", True),
        (f"{OPEN} S1 F2 F2 F2", 3.99, "open", False),
        (f"{OPEN} S1 F2 F2 F2", 4, "half_open", True),
        (f"{OPEN} S1 F31 F31 F31", 32, "half_open", True),
    ],
)
def test_states(story: str, now: float, state: str, admits: bool) -> None:
    """Failures open a breaker, time admits a probe, and a success closes it."""
    breaker = after(story)
    assert (breaker.state(now), breaker.admits(now)) == (state, admits)


def test_a_healthy_breaker_is_a_shared_object() -> None:
    """A success leaves HEALTHY as it is; two successes a memory time apart turn any breaker back into it."""
    assert succeeded(HEALTHY, 5) is HEALTHY
    assert after("F0 S29") is not HEALTHY
    assert after("F0 S29 S30") is HEALTHY
    assert after(f"{OPEN} S40") is not HEALTHY
    assert after(f"{OPEN} S40 S70") is HEALTHY
    assert abandoned(HEALTHY) is HEALTHY


@pytest.mark.parametrize("story, now", [(OPEN, 1.5), (f"{OPEN} P1", 1.5), (f"{OPEN} S1", 1.5)])
def test_requests_from_before_the_opening_are_ignored(story: str, now: float) -> None:
    """Requests that were sent before the breaker opened neither open it again nor close it."""
    breaker = after(story)
    assert failed(breaker, now, asked_at=-1) is breaker
    assert succeeded(breaker, now, asked_at=-1) is breaker
    assert succeeded(breaker, now, asked_at=1).state(now) == "closed"


stories = st.lists(st.tuples(st.sampled_from("FSPA"), st.floats(0, 40)), max_size=60)


def lived(story: list[tuple[str, float]], breaker: Breaker = HEALTHY) -> tuple[Breaker, float]:
    """Apply events with pauses before them; also return the time of the last one."""
    now = 0.0
    for event, pause in story:
        now += pause
        breaker = after(f"{event}{now!r}", breaker)
    return breaker, now


@given(stories, st.floats(0, 100))
def test_every_breaker_recovers(story: list[tuple[str, float]], pause: float) -> None:
    """After any events, a breaker admits a request within its longest open time, and two successes clear it."""
    breaker, now = lived(story)
    assert breaker.admits(now + max(DEFAULT_POLICY.max_open_seconds, DEFAULT_POLICY.probe_seconds) + 1e-6)
    closed = succeeded(breaker, now + pause)
    assert closed.state(now + pause) == "closed"
    assert succeeded(closed, now + pause + DEFAULT_POLICY.memory_seconds + 1e-6) is HEALTHY
    assert breaker.open_seconds <= DEFAULT_POLICY.max_open_seconds


@given(stories)
def test_only_one_probe_at_a_time(story: list[tuple[str, float]]) -> None:
    """While a probe is under way, no other request is admitted."""
    breaker, now = lived(story)
    probed = probing(breaker, now)
    if breaker.state(now) == "half_open":
        assert not probed.admits(now)
        assert probing(probed, now) is probed
        assert abandoned(probed).admits(now)
    else:
        assert probed is breaker


BAD = after(OPEN)
WORSE = after(f"{OPEN} F0.1")
PROBED = after("F-9 F-9 F-9 P0")


@pytest.mark.parametrize(
    "breakers, now, first, last_resort",
    [
        ({}, 0, "a b c d", ""),
        ({"a": after("F0")}, 0, "a b c d", ""),
        ({"a": BAD}, 0.5, "b c d", ""),
        ({"a": BAD, "d": WORSE}, 0.5, "b c", ""),
        ({"a": WORSE, "b": BAD, "d": WORSE}, 0.5, "c", "b"),
        ({"a": WORSE, "b": WORSE, "c": BAD, "d": WORSE}, 0.5, "", "c a"),
        # Among equals, the one whose last failure is the oldest.
        ({"a": after("F0 F0 F0.2"), "b": after("F0 F0 F0.1"), "c": after("F0 F0 F0.3")}, 0.5, "d", "b"),
        # A probe is due; another one is under way.
        ({"a": BAD, "b": BAD}, 1, "a b c d", ""),
        ({"a": PROBED}, 0.5, "b c d", ""),
        ({"a": PROBED, "b": BAD, "c": WORSE}, 0.5, "d", "a"),
    ],
)
def test_admissible_replicas(breakers: dict[str, Breaker], now: float, first: str, last_resort: str) -> None:
    """At most half of the replicas are ejected; of more failing ones, the least bad are a last resort."""
    assert [list(each) for each in admissible("abcd", breakers, now)] == [first.split(), last_resort.split()]


def test_a_single_replica_is_never_ejected() -> None:
    """A variant with one replica has it as a last resort, even if it fails."""
    assert admissible(["a"], {"a": WORSE}, 0.5) == ([], ["a"])
    assert admissible(["a", "b"], {"a": WORSE, "b": BAD}, 0.5) == ([], ["b"])


def test_without_breakers_nothing_is_copied() -> None:
    """Without breakers, the sequence of replicas itself is returned."""
    replicas = ["a", "b"]
    assert admissible(replicas, {}, 0).first is replicas
    assert not any(admissible([], {"a": BAD}, 0))


names = st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1)


@given(names, st.dictionaries(st.sampled_from("abcdefgh"), stories), st.floats(0, 500))
def test_at_most_half_is_ejected(replicas: list[str], story_of: dict[str, list[tuple[str, float]]], now: float) -> None:
    """After any failures some replica may be asked, at most half are ejected, and every closed one is admitted."""
    breakers = {name: lived(story)[0] for name, story in story_of.items()}
    first, last_resort = admissible(replicas, breakers, now)
    asked = [*first, *last_resort]
    assert asked
    assert len(set(asked)) == len(asked)
    assert set(asked) <= set(replicas)
    ejected = [name for name in replicas if name not in asked]
    assert len(ejected) <= len(replicas) // 2
    assert all(name in first for name in replicas if breakers.get(name, HEALTHY).state(now) == "closed")
    badness = {name: breakers[name].badness(now) for name in [*last_resort, *ejected]}
    assert max((badness[name] for name in last_resort), default=(-1, -inf)) <= min(
        (badness[name] for name in ejected), default=(10**9, inf)
    )


@pytest.mark.parametrize(
    "story, failure, rest",
    [
        ("", "F5", ""),
        ("F0", "F5", ""),
        ("F0 F0", "F5", ""),
        ("F0 F0", "F5", "F6"),
        ("F0 F0", "F5", "S6"),
        ("F0", "F5", "F16"),
        (OPEN, "F1", ""),
        (f"{OPEN} P1", "F1", ""),
        (OPEN, "F0.5", ""),
        ("F0 S0 F0 S0 F0 S0 F0 S0 S0", "F1", ""),
    ],
)
def test_a_failure_that_is_taken_back(story: str, failure: str, rest: str) -> None:
    """The breaker is as if the failure had never been, whatever came behind it."""
    before = after(story)
    failing = after(failure, before)
    now = float((rest or failure)[1:])
    taken_back, never = retracted(after(rest, failing), before, failing), after(rest, before)
    assert taken_back.state(now) == never.state(now)
    assert taken_back.failures_in_a_row == never.failures_in_a_row
    if not rest:
        assert (taken_back.tally, taken_back.open_seconds) == (never.tally, never.open_seconds)


def test_a_probe_that_is_taken_back() -> None:
    """The breaker is half-open as before, and admits the next probe."""
    before = after(f"{OPEN} P1")
    failing = after("F2", before)
    taken_back = retracted(failing, before, failing)
    assert taken_back.admits(2)
    assert taken_back.state(2) == "half_open"


def test_who_stays_in_rotation() -> None:
    """At most half of a variant's replicas are left out, and those that time out."""
    assert set(in_rotation("ab", {"a": WORSE, "b": BAD}, 0.5)) == {"b"}
    assert set(in_rotation("a", {"a": WORSE}, 0.5)) == {"a"}
    silent = failed(BAD, 0.2, timed_out=True)
    assert set(in_rotation("a", {"a": silent}, 0.5)) == set()
    assert set(in_rotation("a", {"a": succeeded(silent, 0.3)}, 0.5)) == {"a"}
