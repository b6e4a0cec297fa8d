"""The placements of conversations, against a simple model."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.routing.sessions import MAX_SESSIONS, Placement, Sessions

LIMIT = 3
names = st.sampled_from("abcdef")
variants = st.sampled_from(["bf16", "int8", "int4"])
replicas = st.sampled_from(["r1", "r2"])


class SessionsMachine(RuleBasedStateMachine):
    """The model is a list in the order of use: the first idle session is evicted, or else the first."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions = Sessions(LIMIT)
        self.model: list[tuple[str, Placement]] = []
        self.now = 0.0

    def expected(self, name: str) -> Placement | None:
        """The placement of a session in the model."""
        return dict(self.model).get(name)

    def put(self, name: str, placement: Placement) -> None:
        """Move a session to the end of the model."""
        self.model = [each for each in self.model if each[0] != name] + [(name, placement)]

    @rule(name=names, variant=variants, replica=replicas)
    def begin(self, name: str, variant: str, replica: str) -> None:
        """A turn is sent to a replica."""
        before = self.expected(name)
        assert self.sessions.begin(name, variant, replica) == before
        self.put(name, Placement(variant, replica, 1 if before is None else before.running + 1))
        if len(self.model) > LIMIT:
            idle = [each for each in self.model if not each[1].running]
            self.model.remove((idle or self.model)[0])

    @rule(name=names)
    def end(self, name: str) -> None:
        """An answer ends; its session may be evicted or unknown."""
        before = self.expected(name)
        self.now += 1.0
        self.sessions.end(name, self.now)
        if before is not None and before.running:
            running = before.running - 1
            self.put(name, Placement(before.variant, before.replica_id, running, None if running else self.now))

    @invariant()
    def placements_agree(self) -> None:
        """Every placement is that of the model; a look-up changes nothing."""
        assert len(self.sessions) == len(self.model) <= LIMIT
        for name in "abcdef":
            assert self.sessions.placement(name) == self.expected(name)


TestSessions = SessionsMachine.TestCase


def test_a_conversation() -> None:
    """A placement is that of the latest turn, also after its end; a turn that begins is told the one before it."""
    sessions = Sessions()
    assert sessions.placement("s") is None
    assert sessions.begin("s", "bf16", "r1") is None
    assert sessions.placement("s") == Placement("bf16", "r1", running=1)
    sessions.end("s", 7.0)
    idle = Placement("bf16", "r1", running=0, idle_since_seconds=7.0)
    assert sessions.placement("s") == idle
    assert sessions.begin("s", "int8", "r3") == idle
    sessions.begin("s", "int8", "r3")
    assert sessions.placement("s") == Placement("int8", "r3", running=2)


def test_a_pause_begins_with_the_last_answer() -> None:
    """A conversation is idle from the end of its last turn in flight, and not at all while one runs."""
    sessions = Sessions()
    for _ in range(2):
        sessions.begin("s", "bf16", "r1")
    idle = []
    for now in (100.0, 200.0):
        sessions.end("s", now)
        placement = sessions.placement("s")
        assert placement is not None
        idle.append(placement.idle_seconds(250.0))
    assert idle == [0.0, 50.0]


def test_sessions_are_bounded() -> None:
    """Idle sessions are evicted before one with a turn in flight."""
    sessions = Sessions()
    sessions.begin("mine", "bf16", "r1")
    for number in range(2 * MAX_SESSIONS):
        sessions.begin(f"{number}", "bf16", "r1")
        sessions.end(f"{number}", 0.0)
    assert len(sessions) == MAX_SESSIONS
    assert sessions.placement("mine") == Placement("bf16", "r1", running=1)
    assert sessions.placement("0") is None
