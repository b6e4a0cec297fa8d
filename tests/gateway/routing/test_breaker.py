"""When a breaker opens and closes, and whom of a variant's replicas a request may go to."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.breaker import DEFAULT_POLICY, HEALTHY, Breaker, abandoned, admissible, failed, probing, succeeded


def after(story: str, breaker: Breaker = HEALTHY) -> Breaker:
    """Live through `F`ailure, `S`uccess, `P`robe, `A`bandoned, each at the second after it: "F0 F0.1 S3"."""
    for word in story.split():
        what, now = word[0], float(word[1:])
        if what == "F":
            breaker = failed(breaker, now)
        elif what == "S":
            breaker = succeeded(breaker, now)
        else:
            breaker = probing(breaker, now) if what == "P" else abandoned(breaker)
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
        # A failure of long ago is not in a row with today's.
        ("F0 F0 F30", 30, "closed", True),
        ("F0 F0 F29", 29, "open", False),
        # Half of ten or more.
        ("F0 F0 S0 F0 F0 S0 F0 S0 S0 S0", 0, "closed", True),
        ("F0 F0 S0 F0 F0 S0 S0 S0 S0 F0", 0, "open", False),
        ("F0 S0 F0 S0 F0 S0 F0 S0", 0, "closed", True),
        ("F0 S0 F0 S0 F0 S0 F0 S0 S0 F0", 0, "open", False),
        ("F0 S0 F0 S0 F0 S0 F0 S0 S20 F20", 20, "open", False),
        ("F0 S0 F0 S0 F0 S0 F0 S0 S35 F35", 35, "closed", True),
        # Open for a second, then for twice as long each time, for half a minute at most.
        (OPEN, 0.99, "open", False),
        (OPEN, 1, "half_open", True),
        (f"{OPEN} F1", 2.99, "open", False),
        (f"{OPEN} F1", 3, "half_open", True),
        (f"{OPEN} F1 F3", 7, "half_open", True),
        (REOPENED, 30.99, "open", False),
        (f"{REOPENED} F31", 60.99, "open", False),
        (f"{REOPENED} F31", 61, "half_open", True),
        (f"{REOPENED} F31 F61", 91, "half_open", True),
        # What fails while it is open makes it no longer.
        (f"{OPEN} F0.5 F0.9", 1, "half_open", True),
        # A probe keeps others out until it ends, is abandoned or lost.
        (f"{OPEN} P1", 1, "half_open", False),
        (f"{OPEN} P1", 30.99, "half_open", False),
        (f"{OPEN} P1", 31, "half_open", True),
        (f"{OPEN} P1 A2", 2, "half_open", True),
        (f"{OPEN} P1 F2", 2, "open", False),
        (f"{OPEN} P1 F2", 4, "half_open", True),
        (f"{OPEN} P1 S2", 2, "closed", True),
        # No probe goes to an open one, and a closed one needs none.
        (f"{OPEN} P0.5", 1, "half_open", True),
        ("P0", 0, "closed", True),
        # A last resort that answers closes.
        (f"{OPEN} S0.5", 0.5, "closed", True),
        # Opened again soon: for twice as long; after a good while: for a second.
        (f"{OPEN} S1 F2 F2", 2, "closed", True),
        (f"{OPEN} S1 F2 F2 F2", 3.99, "open", False),
        (f"{OPEN} S1 F2 F2 F2", 4, "half_open", True),
        (f"{OPEN} S1 F31 F31 F31", 32, "half_open", True),
    ],
)
def test_a_life(story: str, now: float, state: str, admits: bool) -> None:
    """Failures open, time lets a probe through, a success closes."""
    breaker = after(story)
    assert (breaker.state(now), breaker.admits(now)) == (state, admits)


def test_health_costs_nothing_and_comes_back() -> None:
    """A success of a healthy replica changes nothing; nor does it of one whose failures are past, but for good."""
    assert succeeded(HEALTHY, 5) is HEALTHY
    assert after("F0 S29") is not HEALTHY
    assert after("F0 S29 S30") is HEALTHY
    assert after(f"{OPEN} S40") is not HEALTHY
    assert after(f"{OPEN} S40 S70") is HEALTHY
    assert abandoned(HEALTHY) is HEALTHY


@pytest.mark.parametrize("story, now", [(OPEN, 1.5), (f"{OPEN} P1", 1.5), (f"{OPEN} S1", 1.5)])
def test_what_was_asked_before_it_opened_says_nothing_new(story: str, now: float) -> None:
    """Twenty requests that hang on one dead replica open it once, and a stream from before doesn't close it."""
    breaker = after(story)
    assert failed(breaker, now, asked_at=-1) is breaker
    assert succeeded(breaker, now, asked_at=-1) is breaker
    assert succeeded(breaker, now, asked_at=1).state(now) == "closed"


stories = st.lists(st.tuples(st.sampled_from("FSPA"), st.floats(0, 40)), max_size=60)


def lived(story: list[tuple[str, float]], breaker: Breaker = HEALTHY) -> tuple[Breaker, float]:
    """Go through a story with pauses between its events; say when it ended."""
    now = 0.0
    for what, pause in story:
        now += pause
        breaker = after(f"{what}{now!r}", breaker)
    return breaker, now


@given(stories, st.floats(0, 100))
def test_whatever_happened_it_heals(story: list[tuple[str, float]], pause: float) -> None:
    """No breaker stays shut for longer than its longest time and a probe; two successes apart wipe the slate clean."""
    breaker, now = lived(story)
    assert breaker.admits(now + max(DEFAULT_POLICY.longest_open_seconds, DEFAULT_POLICY.probe_seconds) + 1e-6)
    closed = succeeded(breaker, now + pause)
    assert closed.state(now + pause) == "closed"
    assert succeeded(closed, now + pause + DEFAULT_POLICY.memory_seconds + 1e-6) is HEALTHY
    assert breaker.open_seconds <= DEFAULT_POLICY.longest_open_seconds


@given(stories)
def test_only_one_probe_at_a_time(story: list[tuple[str, float]]) -> None:
    """Once a probe is given out, nobody else gets one."""
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
        # Of those alike, the one whose last failure is the longest ago.
        ({"a": after("F0 F0 F0.2"), "b": after("F0 F0 F0.1"), "c": after("F0 F0 F0.3")}, 0.5, "d", "b"),
        # A probe is due; another is under way already.
        ({"a": BAD, "b": BAD}, 1, "a b c d", ""),
        ({"a": PROBED}, 0.5, "b c d", ""),
        ({"a": PROBED, "b": BAD, "c": WORSE}, 0.5, "d", "a"),
    ],
)
def test_whom_a_request_may_go_to(breakers: dict[str, Breaker], now: float, first: str, last_resort: str) -> None:
    """Half may be left out; the least bad above that are a last resort."""
    assert [list(each) for each in admissible("abcd", breakers, now)] == [first.split(), last_resort.split()]


def test_a_lone_replica_is_never_left_out() -> None:
    """Where there is no other, the failing one is asked."""
    assert admissible(["a"], {"a": WORSE}, 0.5) == ([], ["a"])
    assert admissible(["a", "b"], {"a": WORSE, "b": BAD}, 0.5) == ([], ["b"])


def test_the_usual_case_costs_nothing() -> None:
    """Without a breaker, the replicas come back as they are."""
    replicas = ["a", "b"]
    assert admissible(replicas, {}, 0).first is replicas
    assert not any(admissible([], {"a": BAD}, 0))


names = st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1)


@given(names, st.dictionaries(st.sampled_from("abcdefgh"), stories), st.floats(0, 500))
def test_never_nobody_and_never_more_than_half_left_out(
    replicas: list[str], story_of: dict[str, list[tuple[str, float]]], now: float
) -> None:
    """Whatever has failed, some replica is asked, at most half are not, and every closed one may be."""
    breakers = {name: lived(story)[0] for name, story in story_of.items()}
    first, last_resort = admissible(replicas, breakers, now)
    asked = [*first, *last_resort]
    assert asked
    assert len(set(asked)) == len(asked)
    assert set(asked) <= set(replicas)
    left_out = [name for name in replicas if name not in asked]
    assert len(left_out) <= len(replicas) // 2
    assert all(name in first for name in replicas if breakers.get(name, HEALTHY).state(now) == "closed")
    badness = {name: breakers[name].badness(now) for name in [*last_resort, *left_out]}
    assert max((badness[name] for name in last_resort), default=(-1, -inf)) <= min(
        (badness[name] for name in left_out), default=(10**9, inf)
    )
