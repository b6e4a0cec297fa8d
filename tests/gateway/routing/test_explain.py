"""Why a request goes where it goes, and what is written down to know it later."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from math import inf
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import ConfigError
from config.schema import NO_FLOOR, Floor, Spill, TimeoutSettings
from config.variant import QualityMeasures, Variant
from gateway.cli.explained import Question, explained, explained_request
from gateway.errors import NotAllowed, RequestError, UnknownModel
from gateway.proxy.decision_log import DecisionLog
from gateway.proxy.leases import Want
from gateway.proxy.routing_features import session_named
from gateway.proxy.snapshot import state_then
from gateway.routing.breaker import Breaker
from gateway.routing.target import Target
from gateway.routing.cluster_state import Query
from gateway.routing.explain import explain
from gateway.routing.explanation import Explanation
from gateway.routing.filters import Rejection
from gateway.routing.latency import LatencyEstimate
from gateway.routing.overload import NOT_OVERLOADED, Overload, refused
from gateway.routing.pick import decide
from gateway.routing.request import Ask
from gateway.routing.sessions import Placement
from gateway.routing.snapshot import (
    Absent,
    RecordedCaller,
    RecordedTarget,
    RecordedVariant,
    State,
    bare,
    held,
    limits_of,
    nested,
    read_state,
)
from gateway.routing.spill import SpillGate
from tests.gateway.routing.test_pick import (
    HI,
    LO,
    LONG,
    MID,
    RUNGS,
    SPILL,
    TARGET,
    breakers,
    fleets,
    gates,
    marks,
    opened,
    promised,
    queries,
    scene,
)

BAD = Variant("bad", "int4", QualityMeasures("measured", 0.3, 0.7, 1.3))
OUTCAST = Rejection(BAD, "its verdict is fail")


def told(
    *outlooks: LatencyEstimate,
    query: Query = LONG,
    floor: Floor = NO_FLOOR,
    precisions: frozenset[str] | None = None,
    target: Target = TARGET,
    now: float = 100.0,
    patience: float = inf,
    absent: tuple[Absent, ...] = (),
    **held_against: Any,
) -> Explanation:
    """What is said of a decision."""
    here = scene(*outlooks, **held_against)
    return explain(target, (floor,), precisions, query, here, now, absent=absent, patience_seconds=patience)


def why(explanation: Explanation) -> dict[str, str]:
    """By replica, why it isn't that one."""
    return {each.replica: each.why_not for each in explanation.candidates}


@given(fleets, queries, gates, breakers, marks, st.floats(0, 200))
def test_it_is_the_decision_that_is_explained(
    fleet: list[LatencyEstimate],
    query: Query,
    turned: dict[tuple[str, str], SpillGate],
    barred: dict[str, Breaker],
    full: dict[str, Overload],
    now: float,
) -> None:
    """Whatever the state, who is chosen is who the gateway would choose, and all others have a reason and a cost."""
    here = scene(*fleet, gates=turned, breakers=barred, marks=full)
    offer = decide(TARGET, RUNGS, query, here, now).offer
    explanation = explain(TARGET, (NO_FLOOR,), None, query, here, now)
    chosen = explanation.chosen
    assert (chosen and (chosen.replica, chosen.reason)) == (offer and (offer.outlook.id, offer.choice.reason))
    assert explanation.because
    assert {each.replica for each in explanation.candidates} == {
        each.id for each in fleet if each.replica.variant in {"hi", "mid", "lo"}
    }
    assert [each.replica for each in explanation.candidates if not each.why_not] == ([chosen.replica] if chosen else [])
    ranks = [each.rank for each in explanation.candidates if each.rank is not None]
    assert ranks == list(range(1, len(ranks) + 1))
    assert not chosen or explanation.candidates[0].replica == chosen.replica
    for each in explanation.candidates:
        if (terms := each.terms) is not None:
            parts = (terms.queue, terms.ahead, terms.kv, terms.reading, -terms.cached, terms.answering)
            assert sum(parts) == pytest.approx(terms.total, abs=1e-6)
    assert len(explanation.rungs) == len(RUNGS)


OTHERS = {"mid-1": "hi is a better rung, and answers", "lo-1": "hi is a better rung, and answers"}
DOWN = {("smol", "hi"): SpillGate(spilling=True, since_seconds=88, owed=0.99)}


@pytest.mark.parametrize(
    "outlooks, given, because, reasons",
    [
        (
            [promised("hi-1"), promised("hi-2", 0.5), promised("mid-1"), promised("lo-1")],
            {},
            "it waits for 0.000 s, spill.after_seconds is 2",
            {"hi-1": "", "hi-2": "0.500 s later than hi-1", **OTHERS},
        ),
        (
            [promised("hi-1", 2.5), promised("mid-1"), promised("lo-1")],
            {},
            "it waits for 0.000 s, spill.after_seconds is 2; hi is too slow: it waits for 2.500 s",
            {
                "mid-1": "",
                "hi-1": "its rung is too slow: hi-1 waits for 2.500 s",
                "lo-1": "mid is a better rung, and answers",
            },
        ),
        (
            [promised("hi-1", 0.875), promised("mid-1")],
            {"gates": DOWN},
            "it waits for 0.000 s, spill.after_seconds is 2; hi spills, and lets this one down",
            {"mid-1": "", "hi-1": "its rung spills, and this request is one of those that go down"},
        ),
        (
            [promised("hi-1", 0.875), promised("mid-1", 1.0), promised("lo-1", 1.5)],
            {"gates": DOWN},
            "it waits for 0.875 s, spill.after_seconds is 2",
            {"hi-1": "", "mid-1": "hi is a better rung, and answers", "lo-1": "hi is a better rung, and answers"},
        ),
        (
            [promised("hi-1", 0.875), promised("mid-1", 1.0), promised("lo-1")],
            {"gates": DOWN},
            "it waits for 0.000 s, spill.after_seconds is 2; hi spills, and lets this one down; mid could answer",
            {
                "lo-1": "",
                "hi-1": "its rung spills, and this request is one of those that go down",
                "mid-1": "its rung spares nobody time: the one above, which lets this request down, is as soon",
            },
        ),
        (
            [promised("hi-1", 9.0), promised("mid-1", 7.0)],
            {},
            "the soonest of all: it waits for 7.000 s, and no rung answers within spill.after_seconds (2)",
            {"mid-1": "", "hi-1": "2.000 s later than mid-1"},
        ),
        (
            [promised("mid-1"), promised("lo-1")],
            {},
            "it waits for 0.000 s, spill.after_seconds is 2; hi has nobody to ask",
            {"mid-1": "", "lo-1": "mid is a better rung, and answers"},
        ),
        (
            [promised("hi-1", has_room=False, requests=512), promised("lo-1")],
            {},
            "it waits for 0.000 s, spill.after_seconds is 2; hi has no room; mid has nobody to ask",
            {"lo-1": "", "hi-1": "full: 512 requests of at most 512"},
        ),
        (
            [promised("hi-1", None, requests=5), promised("hi-2", None, requests=3), promised("lo-1")],
            {},
            "nobody knows how fast it is, so that it has the shortest queue of the best rung that can be asked",
            {
                "hi-2": "",
                "hi-1": "it has 5 requests, hi-2 has 3",
                "lo-1": "hi is a better rung, and answers",
            },
        ),
        (
            [promised("hi-1", context_tokens=50.0), promised("lo-1")],
            {},
            "it waits for 0.000 s, spill.after_seconds is 2; hi has nobody to ask; mid has nobody to ask",
            {"lo-1": "", "hi-1": "its context of 50 tokens is too short"},
        ),
        (
            [promised("hi-1"), promised("hi-2"), promised("lo-1")],
            {"breakers": {"hi-1": opened()}, "now": 0.5},
            "it waits for 0.000 s, spill.after_seconds is 2",
            {"hi-2": "", "hi-1": "its breaker is open", "lo-1": "hi is a better rung, and answers"},
        ),
        (
            [promised("hi-1")],
            {"breakers": {"hi-1": opened()}, "now": 0.5},
            "the last resort: a breaker bars it, and nobody else can be asked",
            {"hi-1": ""},
        ),
        (
            [promised("hi-1"), promised("lo-1", requests=3)],
            {"marks": {"hi-1": refused(NOT_OVERLOADED, 99.9), "lo-1": Overload(most=3)}},
            "nobody can be asked now: it waits in line for whoever has room first",
            {
                "hi-1": "full: it has refused a request, and it is spared for 0.15 s more",
                "lo-1": "full: it has refused a request, and it takes 3 at once",
            },
        ),
        (
            [promised("hi-1"), promised("hi-2", 0.05)],
            {"query": Query(Ask(prompt_tokens=100), stay=Placement("hi", "hi-2"))},
            "it waits for 0.050 s, spill.after_seconds is 2",
            {"hi-2": "", "hi-1": "0.050 s sooner, but the conversation stays on hi-2"},
        ),
        (
            [promised("hi-1"), promised("hi-2")],
            {"query": Query(tried=frozenset({"hi-1"}))},
            "it waits for 0.000 s, spill.after_seconds is 2",
            {"hi-2": "", "hi-1": "it has failed this request already"},
        ),
        (
            [promised("hi-1"), promised("hi-2")],
            {},
            "it waits for 0.000 s, spill.after_seconds is 2",
            {"hi-1": "", "hi-2": "as soon as hi-1, whose turn it is"},
        ),
        (
            [promised("hi-1", 40.0, measured=False)],
            {"patience": 30},
            "the soonest of all: it waits for 40.000 s, and no rung answers within spill.after_seconds (2)",
            {"hi-1": ""},
        ),
        (
            [promised("hi-1", 40.0)],
            {"patience": 30},
            "refused (429): hi-1 is the soonest, waits for 40.000 s, and it may wait for 30 s",
            {"hi-1": "it waits for longer than the request may: 30 s"},
        ),
        ([], {}, "no replica that may answer is ready", {}),
    ],
)
def test_reasons(outlooks: list[LatencyEstimate], given: dict[str, Any], because: str, reasons: dict[str, str]) -> None:
    """What decided it, and for every other replica what is against it."""
    explanation = told(*outlooks, **given)
    assert (explanation.because, why(explanation)) == (because, reasons)


def test_a_lower_rung_that_is_no_sooner() -> None:
    """Going down for others' sake is only for what is sooner there."""
    explanation = told(promised("hi-1", 0.875), promised("mid-1", 1.0), gates=DOWN)
    assert explanation.chosen is not None
    assert explanation.chosen.replica == "hi-1"
    assert [(rung.variant, rung.verdict) for rung in explanation.rungs] == [
        ("hi", "answers"),
        ("mid", "could answer"),
        ("lo", "has nobody to ask"),
    ]


def test_gates() -> None:
    """Which rung spills, since when, and how many of its requests go down."""
    explanation = told(promised("hi-1", 0.875), promised("mid-1"), gates=DOWN)
    assert [(rung.variant, rung.spilling_seconds, rung.share_down) for rung in explanation.rungs] == [
        ("hi", 12, 0.25),
        ("mid", None, 0),
        ("lo", None, 0),
    ]
    slow = told(promised("hi-1", 9.0), promised("mid-1")).rungs[0]
    assert (slow.spilling_seconds, slow.share_down, slow.wait_seconds) == (0, 1, 9)


def test_variants_that_may_not_answer() -> None:
    """Each with its own reason: a figure that misses the floor, a precision, a verdict."""
    target = Target("smol", RUNGS, Floor(kl_mean=0.04), pinned=False, spill=SPILL, excluded=(OUTCAST,))
    everybody = [promised(name) for name in ("hi-1", "mid-1", "lo-1", "bad-1")]
    explanation = told(*everybody, target=target, precisions=frozenset({"int8", "int4"}))
    assert [each.replica for each in explanation.candidates] == ["mid-1"]
    assert {each.variant: each.why for each in explanation.refused} == {
        "hi": "precision bf16 was not asked for",
        "lo": "kl_mean 0.05 misses the floor 0.04",
        "bad": "its verdict is fail",
    }
    nobody = told(*everybody, target=target, floor=Floor(length_ratio=1.0))
    assert (nobody.chosen, nobody.because, nobody.rungs) == (None, "no variant is good enough", ())


def test_replicas_that_are_not_ready() -> None:
    """Those of the ladder are told, whether their variant may answer or not."""
    absent = (Absent("hi-1", "hi", "starting", ""), Absent("x-1", "x", "failed", "crashed"))
    explanation = told(promised("lo-1", stale=True), absent=absent)
    assert explanation.absent == absent[:1]
    assert explanation.candidates[0].stale


def test_the_terms_of_a_cost() -> None:
    """What is cached comes off reading; no more of it than there is to read."""
    outlook = promised(
        *("hi-1", 1.0),
        queue_seconds=0.5,
        ahead_seconds=0.3,
        kv_seconds=0.2,
        fixed_seconds=1.1,
        token_seconds=0.001,
        answer_seconds=0.02,
    )
    query = Query(Ask(prompt_tokens=100, answer_tokens=10), cached_tokens={"hi-1": 1000.0})
    terms = told(outlook, query=query).candidates[0].terms
    assert terms is not None
    figures = (terms.queue, terms.ahead, terms.kv, terms.reading, terms.cached, terms.answering, terms.total)
    assert figures == pytest.approx((0.5, 0.3, 0.2, 0.2, 0.1, 0.2, 1.3))


# Written down


def state_of(
    *outlooks: LatencyEstimate,
    target: Target = TARGET,
    turned: dict[tuple[str, str], SpillGate] | None = None,
    barred: dict[str, Breaker] | None = None,
    full: dict[str, Overload] | None = None,
    **told_beside: Any,
) -> State:
    """A recorded state."""
    by_variant: dict[str, tuple[LatencyEstimate, ...]] = {}
    for each in outlooks:
        name = each.replica.variant
        by_variant[name] = (*by_variant.get(name, ()), bare(each))
    return State(
        recorded=datetime(2026, 1, 1, tzinfo=UTC),
        now_seconds=100.0,
        variants={each.name: RecordedVariant(each.precision, each.quality) for each in (*RUNGS, BAD)},
        models={
            target.name: RecordedTarget.of(target, 30.0),
            "lo": RecordedTarget.of(Target("lo", (LO,), NO_FLOOR, pinned=True), 30.0),
        },
        outlooks=by_variant,
        breakers=held(barred or {}),
        marks=held(full or {}),
        gates=nested(turned or {}),
        **told_beside,
    )


@given(fleets, queries, gates, breakers, marks)
def test_a_recorded_state_decides_as_the_gateway_did(
    fleet: list[LatencyEstimate],
    query: Query,
    turned: dict[tuple[str, str], SpillGate],
    barred: dict[str, Breaker],
    full: dict[str, Overload],
) -> None:
    """Everything that a decision is made on comes back from JSON."""
    target = Target("smol", RUNGS, Floor(kl_mean=0.04), False, spill=SPILL, trust_declared=True, excluded=(OUTCAST,))
    state = state_of(*fleet, target=target, turned=turned, barred=barred, full=full)
    read = read_state(state.to_json(), "f")
    assert read == state
    assert read.target("smol") == target
    here = scene(*fleet, gates=turned, breakers=barred, marks=full)
    assert explain(read.target("smol"), (), None, query, read.scene(), 100.0) == explain(
        target, (), None, query, here, 100.0
    )


@pytest.mark.parametrize(
    "text, words",
    [
        (b"", "f: is no recorded state: Input data was truncated"),
        (b"{}", "missing required field"),
        (b"\xff", "malformed"),
        (
            msgspec.json.encode({**msgspec.to_builtins(state_of()), "format": 2}),
            r"Invalid enum value 2 - at `\$.format`",
        ),
        (msgspec.json.encode({**msgspec.to_builtins(state_of()), "variants": {}}), "'hi'"),
        (msgspec.json.encode({**msgspec.to_builtins(state_of()), "breakers": {"a": {"x": []}, "b": 1}}), "Expected"),
    ],
)
def test_what_is_no_recorded_state(text: bytes, words: str) -> None:
    """It is told where it was, and how one is made."""
    with pytest.raises(ConfigError, match=words):
        read_state(text, "f")


@pytest.mark.parametrize("patience, chosen", [(inf, "hi-1"), (50.0, "hi-1"), (30.0, None)])
@given(blocks=st.lists(st.integers(0), max_size=3).map(tuple))
def test_a_decision_that_was_made(patience: float, chosen: str | None, blocks: tuple[int, ...]) -> None:
    """What it was made on is kept, without the prompt's traces; a wait that was too long was no choice."""
    query = Query(Ask(prompt_tokens=100, blocks=blocks), cached_tokens={"hi-1": 50.0})
    here = scene(promised("hi-1", 40.0), promised("mid-1", 41.0), breakers={"lo-1": opened()})
    floors, precisions = (NO_FLOOR, Floor(kl_mean=0.04)), frozenset({"bf16", "int8"})
    want = Want(TARGET, (HI, MID), 7, query.ask, request_id="r", floors=floors, precisions=precisions)
    decisions = DecisionLog()
    decisions.made(want, query, here, decide(TARGET, want.rungs, query, here, 100.0), 100.0, patience)
    made = decisions.find("r")
    assert made is not None
    state = read_state(state_then(made, 103.0).to_json(), "f")
    asked = state.asked
    assert asked is not None
    assert (asked.chosen, asked.query.ask.blocks, state.now_seconds) == (chosen, (), 100)
    assert state.recorded <= datetime.now(UTC) - timedelta(seconds=3)
    explanation = explained_request(state, asked)
    assert (explanation.chosen and explanation.chosen.replica) == chosen
    assert [each.variant for each in explanation.refused] == ["lo"]
    terms = explanation.candidates[0].terms
    assert terms is not None
    assert terms.cached == pytest.approx(0.05)


def test_nothing_secret_is_written_down() -> None:
    """A replica's key stays where it is."""
    outlook = promised("hi-1")
    secret = msgspec.structs.replace(outlook, replica=replace(outlook.replica, api_key="hunter2"))
    assert b"hunter2" not in state_of(secret).to_json()


# Questions


STATE = state_of(
    promised("hi-1", context_tokens=1000.0),
    promised("hi-2", 0.05),
    promised("mid-1"),
    promised("lo-1"),
    sessions={
        session_named(b"chat", None): Placement("hi", "hi-2"),
        session_named(b"chat", "alice"): Placement("mid", "mid-1"),
    },
    callers={"alice": RecordedCaller(frozenset({"smol"}), limits_of(Floor(kl_mean=0.02)), 2000)},
)


@pytest.mark.parametrize(
    "question, expected",
    [
        (Question("smol"), "hi-1"),
        (Question("lo"), "lo-1"),
        (Question("smol", {b"x-quantgate-precision": b"int4"}), "lo-1"),
        (Question("smol", {b"x-quantgate-floor": b"kl_mean=0.02", b"x-quantgate-precision": b"int8,int4"}), "mid-1"),
        (Question("smol", {b"x-session-id": b"chat"}), "hi-2"),
        (Question("smol", prompt_tokens=5000), "hi-2"),
        (Question("smol", max_tokens=5000), "hi-2"),
        # A key's own limits: its answers may have 2000 tokens at most, for which hi-1 has no room.
        (Question("smol", key="alice"), "hi-2"),
        (Question("smol", key="alice", max_tokens=10), "hi-1"),
    ],
)
def test_questions(question: Question, expected: str) -> None:
    """Who would answer, by headers, lengths and key."""
    chosen = explained(STATE, question).chosen
    assert chosen is not None
    assert chosen.replica == expected


def test_a_key_has_its_own_floor() -> None:
    """What it may not have is told with the figure that misses it."""
    assert [(each.variant, each.why) for each in explained(STATE, Question("smol", key="alice")).refused] == [
        ("lo", "kl_mean 0.05 misses the floor 0.02")
    ]


@pytest.mark.parametrize(
    "question, kind",
    [
        (Question("gpt"), UnknownModel),
        (Question("lo", key="alice"), NotAllowed),
        (Question("smol", key="bob"), RequestError),
        (Question("smol", {b"x-quantgate-floor": b"speed=1"}), RequestError),
    ],
)
def test_questions_that_would_be_refused(question: Question, kind: type[RequestError]) -> None:
    """As the request itself would be."""
    with pytest.raises(kind):
        explained(STATE, question)


def test_patience() -> None:
    """A model's own patience, or else the gateway's."""
    short = TimeoutSettings(queue_seconds=0.5)
    own = Target("smol", RUNGS, NO_FLOOR, False, timeouts=short, spill=Spill())
    assert RecordedTarget.of(own, 30.0).patience_seconds == 0.5
    assert RecordedTarget.of(TARGET, 30.0).patience_seconds == 30.0
    assert explained(state_of(promised("hi-1", 1.6), target=own), Question("smol")).chosen is None
