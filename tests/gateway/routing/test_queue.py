"""Whose turn it is among those who wait, whatever joins, leaves and gives up in between."""

from collections import Counter
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.routing.queue import FairQueue
from gateway.routing.queues import QueueLimits, Queues


def line_of(*keys: str) -> FairQueue[str]:
    """Tickets named key-number, in the order in which they joined."""
    line: FairQueue[str] = FairQueue()
    seen: Counter[str] = Counter()
    for key in keys:
        seen[key] += 1
        line.join(key, f"{key}{seen[key]}", 10)
    return line


def served(line: FairQueue[str]) -> str:
    """Everybody, in the order of their turns."""
    turns = []
    while (ticket := line.next()) is not None:
        turns.append(ticket)
    return " ".join(turns)


@pytest.mark.parametrize(
    "keys, order",
    [
        ("", ""),
        ("aaa", "a1 a2 a3"),
        ("aaab", "a1 b1 a2 a3"),
        ("aaabbc", "a1 b1 c1 a2 b2 a3"),
        ("bacab", "b1 a1 c1 b2 a2"),
    ],
)
def test_keys_take_turns(keys: str, order: str) -> None:
    """First come, first served within a key; one at a time between keys."""
    assert served(line_of(*keys)) == order


def test_who_left_is_passed_over() -> None:
    """In the middle, as the only one of a key, and twice."""
    line = line_of(*"aaabb")
    for ticket in ("a2", "b1", "b2", "b2", "nobody"):
        line.leave(ticket)
    assert len(line) == 2
    assert served(line) == "a1 a3"
    assert len(line) == 0


def test_who_leaves_and_joins_again_is_last() -> None:
    """Giving up and asking anew wins nothing."""
    line = line_of(*"abc")
    line.leave("a1")
    line.join("a", "a1", 20)
    assert served(line) == "b1 c1 a1"


def test_deadlines() -> None:
    """Those whose time is up leave, the most overdue first; a deadline of an earlier stay is void."""
    line: FairQueue[str] = FairQueue()
    for ticket, deadline in [("late", 9.0), ("soon", 3.0), ("again", 1.0), ("sooner", 2.0)]:
        line.join("a", ticket, deadline)
    line.leave("again")
    line.join("a", "again", 8)
    assert line.soonest_deadline() == 2
    assert line.expired(1.9) == []
    assert line.expired(3) == ["sooner", "soon"]
    assert line.expired(inf) == ["again", "late"]
    assert line.soonest_deadline() is None


@given(st.lists(st.sampled_from("abcd"), max_size=40), st.sampled_from("abcde"))
def test_what_is_ahead_is_no_more_than_told(keys: list[str], key: str) -> None:
    """A newcomer is served after no more others than it was told."""
    line = line_of(*keys)
    told = line.ahead(key)
    line.join(key, "newcomer", 10)
    assert served(line).split().index("newcomer") <= told <= len(keys)


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=60))
def test_nobody_starves(keys: list[str]) -> None:
    """With so many keys, the first ticket of each is served within as many turns, though a flood goes on."""
    line = line_of(*keys)
    waiting = set(keys)
    first = set()
    for number in range(len(waiting)):
        line.join(keys[0], f"flood{number}", 10)
        first.add(line.next())
    assert first == {f"{key}1" for key in waiting}


def test_a_storm_of_cancels_leaves_nothing_behind() -> None:
    """What waits is all that is kept, also of deadlines that are far off."""
    line: FairQueue[int] = FairQueue()
    for ticket in range(2000):
        line.join(str(ticket % 7), ticket, 1e9 + ticket)
        if ticket >= 5:
            line.leave(ticket - 5)
    assert len(line) == 5
    assert len(line._deadlines._heap) <= 2 * 5 + 17
    assert line.keys_with("0") <= 6


def fill(bounds: QueueLimits, *joins: tuple[str, str, str, int]) -> tuple[Queues[str, str], list[list[str] | None]]:
    """Join in order: line, key, ticket, bytes; say what came of each."""
    lines: Queues[str, str] = Queues(bounds)
    return lines, [lines.join(name, key, ticket, 10, size) for name, key, ticket, size in joins]


@pytest.mark.parametrize(
    "bounds, joins, outcomes",
    [
        (QueueLimits(most=2), ["x a a1 0", "x a a2 0", "x a a3 0"], [[], [], None]),
        # A lighter key pushes out the newest of the greediest.
        (QueueLimits(most=2), ["x a a1 0", "x a a2 0", "x b b1 0"], [[], [], ["a2"]]),
        (QueueLimits(most=2), ["x a a1 0", "x a a2 0", "x b b1 0", "x b b2 0"], [[], [], ["a2"], None]),
        (QueueLimits(most=2), ["x a a1 0", "x b b1 0", "x c c1 0"], [[], [], None]),
        # Over all lines, and in one.
        (QueueLimits(most=2), ["x a a1 0", "y a a2 0", "z b b1 0"], [[], [], ["a2"]]),
        (QueueLimits(most_in_line=1), ["x a a1 0", "y a a2 0", "x b b1 0"], [[], [], None]),
        (QueueLimits(most_in_line=2), ["x a a1 0", "x a a2 0", "y a a3 0", "x b b1 0"], [[], [], [], ["a2"]]),
        # Bytes as well: as many as it takes.
        (QueueLimits(most_bytes=9), ["x a a1 3", "x a a2 3", "x a a3 3", "x b b1 4"], [[], [], [], ["a3", "a2"]]),
        (QueueLimits(most_bytes=9), ["x a a1 3", "x a a2 3", "x a a3 3", "x b b1 5"], [[], [], [], None]),
        (QueueLimits(most_bytes=9), ["x a a1 10"], [None]),
        (QueueLimits(most_bytes=9), ["x a a1 9", "x a a2 0", "x a a3 1"], [[], [], None]),
        (QueueLimits(most=0), ["x a a1 0"], [None]),
        (QueueLimits(most_in_line=0), ["x a a1 0"], [None]),
    ],
)
def test_who_has_to_go_when_there_is_no_room(
    bounds: QueueLimits, joins: list[str], outcomes: list[list[str] | None]
) -> None:
    """A key within its share is let in at the expense of one beyond it; all others are refused."""
    split = [join.split() for join in joins]
    assert fill(bounds, *((name, key, ticket, int(size)) for name, key, ticket, size in split))[1] == outcomes


def test_lines_take_turns() -> None:
    """One at a time from each line that the replica with room serves."""
    lines, _ = fill(QueueLimits(), *(("x", "a", f"x{number}", 1) for number in range(3)), ("y", "a", "y0", 1))
    assert [lines.next(lambda name: name == "y"), lines.next(lambda name: name == "y")] == ["y0", None]
    lines.join("y", "b", "y1", 10, 1)
    assert [lines.next() for _ in range(5)] == ["x0", "y1", "x1", "x2", None]
    assert lines.waiting_bytes == 0


def test_what_lines_tell() -> None:
    """How many wait, how many before me, and when the first one gives up."""
    lines, _ = fill(QueueLimits(), ("x", "a", "a1", 1), ("x", "a", "a2", 1), ("y", "a", "a3", 1))
    lines.join("y", "b", "b1", 5, 1)
    assert (lines.waiting("x"), lines.waiting("z"), len(lines), lines.soonest_deadline()) == (2, 0, 4, 5)
    assert (lines.ahead("x", "a"), lines.ahead("x", "b"), lines.ahead("z", "a")) == (2, 1, 0)
    assert lines.expired(5) == ["b1"]
    assert sorted(lines.expired(inf)) == ["a1", "a2", "a3"]
    assert lines.soonest_deadline() is None


class AnyTurnOfEvents(RuleBasedStateMachine):
    """Joins, leaves, turns and deadlines in any order, beside a plain list of who waits."""

    bounds = QueueLimits(most_in_line=4, most=7, most_bytes=30)

    def __init__(self) -> None:
        super().__init__()
        self.lines: Queues[str, int] = Queues(self.bounds)
        self.model: dict[int, tuple[str, str, float, int]] = {}
        self.count = 0

    @rule(
        name=st.sampled_from("xyz"), key=st.sampled_from("abcd"), deadline=st.integers(0, 20), size=st.integers(0, 12)
    )
    def join(self, name: str, key: str, deadline: int, size: int) -> None:
        self.count += 1
        pushed_out = self.lines.join(name, key, self.count, deadline, size)
        if pushed_out is None:
            assert self.too_full_for(name, size)
            # With four keys at most, one that has nothing waiting and asks for no more than a quarter always gets in.
            assert size > self.bounds.most_bytes // 4 or any(each[1] == key for each in self.model.values())
            return
        assert not pushed_out or self.too_full_for(name, size)
        assert key not in {self.model[ticket][1] for ticket in pushed_out}
        for ticket in pushed_out:
            del self.model[ticket]
        self.model[self.count] = name, key, deadline, size

    def too_full_for(self, name: str, size: int) -> bool:
        in_line = sum(each[0] == name for each in self.model.values())
        total_bytes = sum(each[3] for each in self.model.values())
        bounds = self.bounds
        return (
            in_line >= bounds.most_in_line or len(self.model) >= bounds.most or total_bytes + size > bounds.most_bytes
        )

    @precondition(lambda self: self.count > 0)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        ticket = data.draw(st.integers(1, self.count))
        self.lines.leave(ticket)
        self.model.pop(ticket, None)

    @rule(served=st.frozensets(st.sampled_from("xyz")))
    def turn(self, served: frozenset[str]) -> None:
        ticket = self.lines.next(served.__contains__)
        if ticket is None:
            assert not any(each[0] in served for each in self.model.values())
            return
        name, key, _, _ = self.model.pop(ticket)
        assert name in served
        assert not any(other < ticket and each[:2] == (name, key) for other, each in self.model.items())

    @rule(now=st.integers(0, 20))
    def expire(self, now: int) -> None:
        due = {ticket for ticket, each in self.model.items() if each[2] <= now}
        gone = self.lines.expired(now)
        assert len(gone) == len(due)
        assert set(gone) == due
        for ticket in due:
            del self.model[ticket]

    @invariant()
    def accounts_are_right(self) -> None:
        lines, model = self.lines, self.model
        assert len(lines) == len(model) <= self.bounds.most
        assert lines.waiting_bytes == sum(each[3] for each in model.values()) <= self.bounds.most_bytes
        for name in "xyz":
            assert lines.waiting(name) == sum(each[0] == name for each in model.values()) <= self.bounds.most_in_line
        assert lines.soonest_deadline() == min((each[2] for each in model.values()), default=None)
        assert set(lines._lines) == {each[0] for each in model.values()}
        assert set(lines._held) == {each[1] for each in model.values()}


TestAnyTurnOfEvents = AnyTurnOfEvents.TestCase
