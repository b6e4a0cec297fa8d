"""Queues: the order of turns, deadlines, and who is evicted when a limit is reached."""

from collections import Counter
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.routing.queue import FairQueue, QueueLimits, Queues


def queue_of(*keys: str) -> FairQueue[str]:
    """A queue of waiters named by key and number, in the order in which they joined."""
    queue: FairQueue[str] = FairQueue()
    counts: Counter[str] = Counter()
    for key in keys:
        counts[key] += 1
        queue.join(key, f"{key}{counts[key]}", 10)
    return queue


def served(queue: FairQueue[str]) -> str:
    """All waiters, in the order of their turns."""
    turns = []
    while (waiter := queue.next()) is not None:
        turns.append(waiter)
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
    """Keys take turns, one waiter at a time; within a key, first come, first served."""
    assert served(queue_of(*keys)) == order


def test_a_waiter_that_left_is_skipped() -> None:
    """A waiter may leave from the middle, as the last of its key, and more than once."""
    queue = queue_of(*"aaabb")
    for waiter in ("a2", "b1", "b2", "b2", "absent"):
        queue.leave(waiter)
    assert len(queue) == 2
    assert served(queue) == "a1 a3"
    assert len(queue) == 0


def test_a_waiter_that_joins_again_is_last() -> None:
    """A waiter that leaves and joins again loses its place."""
    queue = queue_of(*"abc")
    queue.leave("a1")
    queue.join("a", "a1", 20)
    assert served(queue) == "b1 c1 a1"


def test_deadlines() -> None:
    """Expired waiters leave, the most overdue first; a deadline from before a waiter left is void."""
    queue: FairQueue[str] = FairQueue()
    for waiter, deadline in [("late", 9.0), ("soon", 3.0), ("again", 1.0), ("sooner", 2.0)]:
        queue.join("a", waiter, deadline)
    queue.leave("again")
    queue.join("a", "again", 8)
    assert queue.soonest_deadline() == 2
    assert queue.expired(1.9) == []
    assert queue.expired(3) == ["sooner", "soon"]
    assert queue.expired(inf) == ["again", "late"]
    assert queue.soonest_deadline() is None


@given(st.lists(st.sampled_from("abcd"), max_size=40), st.sampled_from("abcde"))
def test_ahead_is_an_upper_bound(keys: list[str], key: str) -> None:
    """A newcomer is served after at most as many others as `ahead` said."""
    queue = queue_of(*keys)
    bound = queue.ahead(key)
    queue.join(key, "newcomer", 10)
    assert served(queue).split().index("newcomer") <= bound <= len(keys)


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=60))
def test_no_key_starves(keys: list[str]) -> None:
    """With n keys, the first waiter of each is served within n turns, even if one key keeps joining."""
    queue = queue_of(*keys)
    waiting = set(keys)
    first = set()
    for number in range(len(waiting)):
        queue.join(keys[0], f"flood{number}", 10)
        first.add(queue.next())
    assert first == {f"{key}1" for key in waiting}


def test_cancelled_waiters_leave_nothing_behind() -> None:
    """Waiters that left are not kept, and hardly any of their entries in the heap of deadlines."""
    queue: FairQueue[int] = FairQueue()
    for waiter in range(2000):
        queue.join(str(waiter % 7), waiter, 1e9 + waiter)
        if waiter >= 5:
            queue.leave(waiter - 5)
    assert len(queue) == 5
    assert len(queue._deadlines._heap) <= 2 * 5 + 17
    assert queue.keys_with("0") <= 6


def fill(limits: QueueLimits, *joins: tuple[str, str, str, int]) -> tuple[Queues[str, str], list[list[str] | None]]:
    """Join waiters in order, each given as queue, key, waiter and bytes; also return the results."""
    queues: Queues[str, str] = Queues(limits)
    return queues, [queues.join(name, key, waiter, 10, size) for name, key, waiter, size in joins]


@pytest.mark.parametrize(
    "limits, joins, results",
    [
        (QueueLimits(max_waiters=2), ["x a a1 0", "x a a2 0", "x a a3 0"], [[], [], None]),
        # A key with less evicts the newest waiter of the key with the most.
        (QueueLimits(max_waiters=2), ["x a a1 0", "x a a2 0", "x b b1 0"], [[], [], ["a2"]]),
        (QueueLimits(max_waiters=2), ["x a a1 0", "x a a2 0", "x b b1 0", "x b b2 0"], [[], [], ["a2"], None]),
        (QueueLimits(max_waiters=2), ["x a a1 0", "x b b1 0", "x c c1 0"], [[], [], None]),
        # The limits of all queues together, and of one queue.
        (QueueLimits(max_waiters=2), ["x a a1 0", "y a a2 0", "z b b1 0"], [[], [], ["a2"]]),
        (QueueLimits(max_per_queue=1), ["x a a1 0", "y a a2 0", "x b b1 0"], [[], [], None]),
        (QueueLimits(max_per_queue=2), ["x a a1 0", "x a a2 0", "y a a3 0", "x b b1 0"], [[], [], [], ["a2"]]),
        # The limit of bytes evicts as many waiters as necessary.
        (QueueLimits(max_bytes=9), ["x a a1 3", "x a a2 3", "x a a3 3", "x b b1 4"], [[], [], [], ["a3", "a2"]]),
        (QueueLimits(max_bytes=9), ["x a a1 3", "x a a2 3", "x a a3 3", "x b b1 5"], [[], [], [], None]),
        (QueueLimits(max_bytes=9), ["x a a1 10"], [None]),
        (QueueLimits(max_bytes=9), ["x a a1 9", "x a a2 0", "x a a3 1"], [[], [], None]),
        (QueueLimits(max_waiters=0), ["x a a1 0"], [None]),
        (QueueLimits(max_per_queue=0), ["x a a1 0"], [None]),
    ],
)
def test_eviction(limits: QueueLimits, joins: list[str], results: list[list[str] | None]) -> None:
    """A key within its share evicts waiters of a key beyond its share; other waiters are refused."""
    split = [join.split() for join in joins]
    assert fill(limits, *((name, key, waiter, int(size)) for name, key, waiter, size in split))[1] == results


def test_queues_take_turns() -> None:
    """Tickets come from the queues in turn, one at a time; a queue that is not served keeps its place."""
    queues, _ = fill(QueueLimits(), *(("x", "a", f"x{number}", 1) for number in range(3)), ("y", "a", "y0", 1))
    assert [queues.next(lambda name: name == "y"), queues.next(lambda name: name == "y")] == ["y0", None]
    queues.join("y", "b", "y1", 10, 1)
    assert [queues.next() for _ in range(5)] == ["x0", "y1", "x1", "x2", None]
    assert queues.waiting_bytes == 0


def test_counts_of_queues() -> None:
    """Queues count their waiters and those ahead of a key, and return the first deadline."""
    queues, _ = fill(QueueLimits(), ("x", "a", "a1", 1), ("x", "a", "a2", 1), ("y", "a", "a3", 1))
    queues.join("y", "b", "b1", 5, 1)
    assert (queues.waiting("x"), queues.waiting("z"), len(queues), queues.soonest_deadline()) == (2, 0, 4, 5)
    assert (queues.ahead("x", "a"), queues.ahead("x", "b"), queues.ahead("z", "a")) == (2, 1, 0)
    assert queues.expired(5) == ["b1"]
    assert sorted(queues.expired(inf)) == ["a1", "a2", "a3"]
    assert queues.soonest_deadline() is None


class QueuesMachine(RuleBasedStateMachine):
    """Joins, leaves, turns and deadlines in any order; the model is a dict of the waiters."""

    limits = QueueLimits(max_per_queue=4, max_waiters=7, max_bytes=30)

    def __init__(self) -> None:
        super().__init__()
        self.queues: Queues[str, int] = Queues(self.limits)
        self.model: dict[int, tuple[str, str, float, int]] = {}
        self.count = 0

    @rule(
        name=st.sampled_from("xyz"), key=st.sampled_from("abcd"), deadline=st.integers(0, 20), size=st.integers(0, 12)
    )
    def join(self, name: str, key: str, deadline: int, size: int) -> None:
        self.count += 1
        evicted = self.queues.join(name, key, self.count, deadline, size)
        if evicted is None:
            assert self.exceeds_limits(name, size)
            # With at most four keys, one without waiters that needs a quarter of the bytes at most always gets in.
            assert size > self.limits.max_bytes // 4 or any(each[1] == key for each in self.model.values())
            return
        assert not evicted or self.exceeds_limits(name, size)
        assert key not in {self.model[waiter][1] for waiter in evicted}
        for waiter in evicted:
            del self.model[waiter]
        self.model[self.count] = name, key, deadline, size

    def exceeds_limits(self, name: str, size: int) -> bool:
        in_queue = sum(each[0] == name for each in self.model.values())
        total_bytes = sum(each[3] for each in self.model.values())
        limits = self.limits
        return (
            in_queue >= limits.max_per_queue
            or len(self.model) >= limits.max_waiters
            or total_bytes + size > limits.max_bytes
        )

    @precondition(lambda self: self.count > 0)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        waiter = data.draw(st.integers(1, self.count))
        self.queues.leave(waiter)
        self.model.pop(waiter, None)

    @rule(served=st.frozensets(st.sampled_from("xyz")))
    def take_turn(self, served: frozenset[str]) -> None:
        waiter = self.queues.next(served.__contains__)
        if waiter is None:
            assert not any(each[0] in served for each in self.model.values())
            return
        name, key, _, _ = self.model.pop(waiter)
        assert name in served
        assert not any(other < waiter and each[:2] == (name, key) for other, each in self.model.items())

    @rule(now=st.integers(0, 20))
    def expire(self, now: int) -> None:
        due = {waiter for waiter, each in self.model.items() if each[2] <= now}
        expired = self.queues.expired(now)
        assert len(expired) == len(due)
        assert set(expired) == due
        for waiter in due:
            del self.model[waiter]

    @invariant()
    def counts_agree(self) -> None:
        queues, model = self.queues, self.model
        assert len(queues) == len(model) <= self.limits.max_waiters
        assert queues.waiting_bytes == sum(each[3] for each in model.values()) <= self.limits.max_bytes
        for name in "xyz":
            assert queues.waiting(name) == sum(each[0] == name for each in model.values()) <= self.limits.max_per_queue
        assert queues.soonest_deadline() == min((each[2] for each in model.values()), default=None)
        assert set(queues._queues) == {each[0] for each in model.values()}
        assert set(queues._usage) == {each[1] for each in model.values()}


TestQueues = QueuesMachine.TestCase
