"""The home of a conversation: the same at every gateway, evenly spread, and hardly moved by other replicas."""

import subprocess
import sys
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.pick import look_at_rung
from gateway.routing.rendezvous import (
    CACHED_SHARE,
    EMPTY_TABLE,
    SHARED_FROM,
    RendezvousTable,
    hash_of,
    highest_weight,
    unseen_share,
    with_homes,
)
from gateway.routing.sessions import Placement
from tests.fakes.running import ROOT
from tests.gateway.routing.clusters import HI, NOW, cluster, estimate, request

SESSIONS = [hash_of(f"session {number}") for number in range(2000)]
NAMES = [f"hi-{number}" for number in range(10)]
replica_ids = st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=12, unique=True)


@given(replica_ids, st.text(min_size=1, max_size=20), st.integers(0, 2**60 - 1))
def test_a_replica_that_leaves_or_joins_moves_only_its_own_conversations(
    ids: list[str], other: str, session_hash: int
) -> None:
    """The home changes only from the one that left, or to the one that joined."""
    before = RendezvousTable.of(ids).home(session_hash)
    fewer = RendezvousTable.of(ids[1:]).home(session_hash)
    assert fewer == before if before != ids[0] else fewer != before
    if other not in ids:
        assert RendezvousTable.of([*ids, other]).home(session_hash) in (before, other)


@given(replica_ids, st.integers(0, 2**60 - 1), st.randoms())
def test_the_order_of_replicas_does_not_matter(ids: list[str], session_hash: int, chance: Random) -> None:
    """Gateways learn of replicas in any order."""
    shuffled = list(ids)
    chance.shuffle(shuffled)
    assert RendezvousTable.of(ids).home(session_hash) == RendezvousTable.of(shuffled).home(session_hash)


def test_conversations_are_spread_evenly() -> None:
    """Of ten replicas each is the home of a tenth; when one leaves, the others take equal parts of that."""
    table = RendezvousTable.of(NAMES)
    homes = [table.home(each) for each in SESSIONS]
    assert max(Counter(homes).values()) <= 1.2 * len(SESSIONS) / len(NAMES)
    rest = RendezvousTable.of(NAMES[1:])
    moved = Counter(rest.home(each) for each, home in zip(SESSIONS, homes, strict=True) if home == NAMES[0])
    assert len(moved) == len(NAMES) - 1
    assert max(moved.values()) <= 2 * sum(moved.values()) / len(moved)
    assert EMPTY_TABLE.home(1) is None


def test_every_process_hashes_alike() -> None:
    """Python's own hashes of texts differ from process to process; these do not."""
    program = "from gateway.routing.rendezvous import hash_of; print(hash_of('s'))"
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert int(out.stdout) == hash_of("s")


def test_a_home_has_probably_cached_what_is_not_known() -> None:
    """A share of the prompt, unless more is known; what is known of others stays."""
    expected = CACHED_SHARE * 100.0
    assert with_homes({"a": 10.0, "b": 90.0}, ["a", "b", "c"], 100.0) == {"a": expected, "b": 90.0, "c": expected}
    known = {"a": 90.0}
    assert with_homes(known, ["a"], 100.0) is known


def test_a_gateway_learns_whether_it_is_the_only_one() -> None:
    """A single unseen conversation, as after a restart, shows nothing; if half are unseen, it takes a few."""
    assert unseen_share(0.0, unseen=True) < SHARED_FROM
    share = 0.0
    for number in range(10):
        share = unseen_share(share, unseen=number % 2 == 0)
    assert share >= SHARED_FROM
    for _ in range(200):
        share = unseen_share(share, unseen=False)
    assert share < SHARED_FROM


# The choice of a replica


def picked(*waits: float, session_hash: int, placement: Placement | None = None) -> str:
    """Which replica of a rung answers; each waits so long."""
    replicas = [estimate(f"hi-{place}", wait, hash=hash_of(f"hi-{place}")) for place, wait in enumerate(waits)]
    asked = request(rungs=(HI,), prompt_tokens=100, session_hash=session_hash, placement=placement)
    candidate = look_at_rung(0, asked, cluster(*replicas), 0.0, NOW, False).candidate
    assert candidate is not None
    return candidate.replica.id


@pytest.mark.parametrize("session_hash", SESSIONS[:20])
def test_where_a_conversation_goes_that_was_not_seen_here(session_hash: int) -> None:
    """To its home while that costs hardly more than the cheapest, else to the next by weight."""
    hashes = [hash_of(f"hi-{place}") for place in range(3)]
    home = highest_weight(session_hash, hashes)
    assert picked(0.1, 0.1, 0.1, session_hash=session_hash) == f"hi-{home}"
    slightly = [0.1 if place == home else 0.0 for place in range(3)]
    assert picked(*slightly, session_hash=session_hash) == f"hi-{home}"
    loaded = [5.0 if place == home else 0.0 for place in range(3)]
    hashes[home] = -1
    rest = [place for place in range(3) if place != home]
    second = rest[highest_weight(session_hash, [hashes[place] for place in rest])]
    assert picked(*loaded, session_hash=session_hash) == f"hi-{second}"


@pytest.mark.parametrize(
    "placement, stays",
    [
        (Placement("hi", "hi-1", 0, NOW), True),
        (Placement("hi", "hi-gone", 0, NOW), False),
        (None, False),
    ],
)
def test_a_conversation_that_was_seen_here_stays(placement: Placement | None, stays: bool) -> None:
    """What this gateway knows goes before the home."""
    away = next(each for each in SESSIONS if highest_weight(each, [hash_of(f"hi-{place}") for place in range(3)]) == 0)
    assert picked(0.1, 0.1, 0.1, session_hash=away, placement=placement) == ("hi-1" if stays else "hi-0")


def test_many_concurrent_turns_of_one_session_are_spread() -> None:
    """A session with a turn in flight is no conversation that takes turns: the cheapest replica answers."""
    running = Placement("hi", "hi-0", 1)
    assert {picked(0.1, 0.1, 0.0, session_hash=each, placement=running) for each in SESSIONS[:20]} == {"hi-2"}


def test_a_wait_at_the_home_opens_no_gate() -> None:
    """Others need not wait: only the request itself does."""
    session_hash = next(
        each for each in SESSIONS if highest_weight(each, [hash_of("hi-0"), hash_of("hi-1"), hash_of("mid-0")]) == 0
    )
    replicas = [estimate(name, wait, hash=hash_of(name)) for name, wait in (("hi-0", 2.1), ("hi-1", 1.9), ("mid-0", 0))]
    asked = request(prompt_tokens=100, session_hash=session_hash)
    assert look_at_rung(0, asked, cluster(*replicas), 0.0, NOW, False).gate is None
