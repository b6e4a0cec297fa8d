"""Where conversations are, against a naive model."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.routing.sessions import MOST_SESSIONS, Placement, Sessions

MOST = 3
names = st.sampled_from("abcdef")
variants = st.sampled_from(["bf16", "int8", "int4"])
replicas = st.sampled_from(["r1", "r2"])


class Conversations(RuleBasedStateMachine):
    """A list in the order of use, the youngest last, from which the first idle one goes, or else the first."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions = Sessions(MOST)
        self.model: list[tuple[str, Placement]] = []

    def found(self, name: str) -> Placement | None:
        """What the model has of a session."""
        return dict(self.model).get(name)

    def put(self, name: str, stay: Placement) -> None:
        """Use a session."""
        self.model = [each for each in self.model if each[0] != name] + [(name, stay)]

    @rule(name=names, variant=variants, replica=replicas)
    def goes(self, name: str, variant: str, replica: str) -> None:
        """A turn is sent somewhere."""
        before = self.found(name)
        changed = self.sessions.went(name, variant, replica)
        assert changed == (before is not None and before.variant != variant)
        self.put(name, Placement(variant, replica, 1 if before is None else before.running + 1))
        if len(self.model) > MOST:
            idle = [each for each in self.model if not each[1].running]
            self.model.remove((idle or self.model)[0])

    @rule(name=names)
    def ends(self, name: str) -> None:
        """An answer ends, maybe of one that was forgotten or never known."""
        before = self.found(name)
        self.sessions.ended(name)
        if before is not None and before.running:
            self.put(name, Placement(before.variant, before.replica_id, before.running - 1))

    @invariant()
    def the_same(self) -> None:
        """Each is where the model has it, and looking changes nothing."""
        assert len(self.sessions) == len(self.model) <= MOST
        for name in "abcdef":
            assert self.sessions.stay(name) == self.found(name)


TestConversations = Conversations.TestCase


def test_a_conversation() -> None:
    """It stays where its latest turn was, while that runs and after; a change of variant is told."""
    sessions = Sessions()
    assert sessions.stay("s") is None
    assert not sessions.went("s", "bf16", "r1")
    assert sessions.stay("s") == Placement("bf16", "r1", running=1)
    sessions.ended("s")
    assert sessions.stay("s") == Placement("bf16", "r1", running=0)
    assert not sessions.went("s", "bf16", "r2")
    sessions.ended("s")
    assert sessions.went("s", "int8", "r3")
    assert not sessions.went("s", "int8", "r3")
    assert sessions.stay("s") == Placement("int8", "r3", running=2)


def test_a_flood_of_sessions_is_bounded() -> None:
    """Those that wait for their answer are kept before those that don't; nothing is kept of the others."""
    sessions = Sessions()
    sessions.went("mine", "bf16", "r1")
    for number in range(2 * MOST_SESSIONS):
        sessions.went(f"{number}", "bf16", "r1")
        sessions.ended(f"{number}")
    assert len(sessions) == MOST_SESSIONS
    assert sessions.stay("mine") == Placement("bf16", "r1", running=1)
    assert sessions.stay("0") is None
