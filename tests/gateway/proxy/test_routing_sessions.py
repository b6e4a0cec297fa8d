"""Which conversation a request belongs to, by its name or by its first turns."""

from typing import Any

import pytest

from gateway.keys import Caller
from gateway.openai.endpoints import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    MESSAGES,
    RESPONSES,
    TOKENIZE,
    Endpoint,
)
from gateway.proxy.affinity import Affinity
from gateway.proxy.leases import Lease
from gateway.proxy.routing_features import (
    MAX_TURNS_BYTES,
    permitted_rungs,
    routing_request,
)
from gateway.routing.request import RoutingRequest
from gateway.routing.sessions import Placement
from gateway.routing.spill import PAUSE_SECONDS
from tests.gateway.proxy.contexts import CANDIDATE, METRICS, REPLICA, request_context
from tests.gateway.proxy.features import HI, JSON, TURNS, Body, parsed, session, turn


@pytest.mark.parametrize(
    "endpoint, body, header",
    [
        (CHAT, HI, "mine"),
        (CHAT, {**HI, "prompt_cache_key": "k"}, None),
        (CHAT, {**HI, "user": "u"}, None),
        (CHAT, {**HI, "safety_identifier": "u"}, None),
        (COMPLETIONS, {"prompt": "once", "user": "u"}, None),
        (RESPONSES, {"input": "hi", "prompt_cache_key": "k"}, None),
        (MESSAGES, {**HI, "metadata": {"user_id": "u"}}, None),
        (MESSAGES, HI, "mine"),
    ],
)
def test_a_named_session(endpoint: Endpoint, body: Body, header: str | None) -> None:
    """All turns with a name have one session id of a fixed length; another API key has another."""
    headers = {} if header is None else {"x_session_id": header}
    name = session(body, endpoint, **headers)
    assert name is not None
    assert len(name) == 32
    assert session({**body, "temperature": 1}, endpoint, **headers) == name
    others = {session(body, endpoint, key, **headers) for key in ("team-b", "team", "", None)}
    assert name not in others
    assert len(others) == 3  # "" and None are the same: no key has an empty name


def test_the_order_of_names() -> None:
    """The header comes before `prompt_cache_key`, and that before `user`; empty names do not count."""
    named = {"prompt_cache_key": "k", "user": "u", "messages": TURNS}
    assert session(named, x_session_id="h") == session(HI, x_session_id="h") != session(named)
    assert session(named) == session({"prompt_cache_key": "k", **HI})
    assert session({**named, "prompt_cache_key": None}) == session({"user": "u", **HI})
    assert session({**named, "prompt_cache_key": "", "user": ""}) == session({"messages": TURNS})
    assert session({**HI, "user": None}, x_session_id="") is None


@pytest.mark.parametrize("size", [257, 5000, 200_000])
def test_long_names(size: int) -> None:
    """They are told apart by both ends and by their length."""
    names = ["x" * size, "y" + "x" * (size - 1), "x" * (size - 1) + "y", "x" * (size + 1)]
    assert len({session(HI, x_session_id=name) for name in names}) == 4
    assert len({session({**HI, "user": name}) for name in names}) == 4
    assert len(session(HI, x_session_id=names[0]) or "") == 32


def test_sessions_of_keys_are_separate() -> None:
    """The boundary between the key's name and the session's is part of the hash."""
    assert session(HI, key="a", x_session_id="b c") != session(HI, key="a b", x_session_id="c")
    assert session(HI, key="a", x_session_id="1 a") != session(HI, key="a 1", x_session_id="a")


ITEMS = [
    turn("user", "Weather?"),
    {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "sun"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Sun."}]},
    turn("user", "And tomorrow?"),
]


@pytest.mark.parametrize(
    "endpoint, key, turns, first",
    [
        (CHAT, "messages", TURNS, 2),
        (CHAT, "messages", [turn("system", "Be brief."), *TURNS], 3),
        (CHAT, "messages", [turn("user", '"role": "assistant"'), *TURNS], 3),
        (CHAT, "messages", [{"content": "Hi", "role": "user"}, {"content": None, "role": "assistant"}, *TURNS], 2),
        (CHAT, "messages", [turn("user", "x" * 100_000), *TURNS], 3),
        (RESPONSES, "input", TURNS, 2),
        (RESPONSES, "input", ITEMS, 2),
        (MESSAGES, "messages", [turn("user", [{"type": "text", "text": "Hi"}]), *TURNS], 3),
    ],
)
def test_a_conversation_is_identified_by_its_first_turns(
    endpoint: Endpoint, key: str, turns: list[Body], first: int
) -> None:
    """No session before the model's first turn; from then on it is the same, whatever turns follow."""
    sessions = [session({key: turns[:count]}, endpoint) for count in range(1, len(turns) + 1)]
    assert sessions[: first - 1] == [None] * (first - 1)
    assert len(set(sessions[first - 1 :])) == 1
    assert session({key: turns}, endpoint, "team-b") != sessions[-1]
    changed = [{**turns[0], "name": "other"}, *turns[1:]]
    assert session({key: changed}, endpoint) not in {None, sessions[-1]}
    other_answer = [*turns[: first - 1], {**turns[first - 1], "name": "other"}, *turns[first:]]
    assert session({key: other_answer}, endpoint) not in {None, sessions[-1]}


OPENINGS = [
    (CHAT, "messages", TURNS, 1),
    (CHAT, "messages", [turn("system", "Be brief."), turn("user", [{"type": "text", "text": "Hi"}]), *TURNS[1:]], 2),
    (RESPONSES, "input", ITEMS, 1),
    (MESSAGES, "messages", TURNS, 1),
]


@pytest.mark.parametrize("endpoint, key, turns, first", OPENINGS)
def test_while_a_rung_spills_a_conversation_is_known_from_its_first_turn_on(
    endpoint: Endpoint, key: str, turns: list[Body], first: int
) -> None:
    """The first turn has a session of its own, under which the second one finds its placement."""
    known = Affinity(METRICS)

    def asked(count: int, spilling_seconds: float | None = 1e6, **fields: Any) -> RoutingRequest:
        inference = parsed(endpoint, {key: turns[:count], **fields})
        context = request_context(inference, Caller("team-a"), JSON)
        return routing_request(context, permitted_rungs(context), 0, known, True, spilling_seconds)

    opening = asked(first)
    assert opening.session is not None
    assert (asked(first, spilling_seconds=None).session, opening.placement) == (None, None)
    lease = Lease(CANDIDATE, opening, 0.0, (known,), lambda _: None)
    lease.replica = REPLICA
    with lease.acquire():
        assert asked(first).placement == Placement("hi", "hi-1", running=1)
    later = [asked(count) for count in range(first + 1, len(turns) + 1)]
    assert {each.session for each in later} == {session({key: turns}, endpoint)}
    assert {each.placement.replica_id for each in later if each.placement} == {lease.replica.id}
    assert asked(first + 1, spilling_seconds=None).placement is None
    # Who names a conversation has no use for its opening.
    assert asked(len(turns), prompt_cache_key="other", spilling_seconds=1.0).placement is None


@pytest.mark.parametrize("endpoint, key, turns, first", OPENINGS)
def test_an_unknown_conversation_that_goes_on_began_before_rungs_spilled(
    endpoint: Endpoint, key: str, turns: list[Body], first: int
) -> None:
    """It lives on the best rung; after PAUSE_SECONDS it would have paused, and a first turn lives nowhere."""
    context = request_context(parsed(endpoint, {key: turns}), Caller("team-a"), JSON)
    beginning = request_context(parsed(endpoint, {key: turns[:first]}), Caller("team-a"), JSON)
    placements = [
        routing_request(each, permitted_rungs(each), 0, Affinity(METRICS), True, seconds).placement
        for each, seconds in ((context, 1.0), (context, PAUSE_SECONDS), (beginning, 1.0))
    ]
    assert placements == [Placement("hi", ""), None, None]


def test_instructions_identify_a_conversation_and_tools_do_not() -> None:
    """A client may add tools during a conversation."""
    plain = session({"messages": TURNS}, MESSAGES)
    assert session({"messages": TURNS, "system": "Be brief."}, MESSAGES) != plain
    assert session({"messages": TURNS, "tools": [{"name": "t"}]}, MESSAGES) == plain
    assert session({"input": TURNS, "instructions": "Be brief."}, RESPONSES) != session({"input": TURNS}, RESPONSES)
    assert session({"messages": TURNS, "tools": [{"name": "t"}]}) == session({"messages": TURNS})


@pytest.mark.parametrize(
    "endpoint, body",
    [
        (CHAT, {}),
        (CHAT, {"messages": "hi"}),
        (CHAT, {"messages": ["hi"]}),
        (CHAT, {"messages": [turn("user", "Hi"), turn("user", '{"role":"assistant"}')]}),
        (CHAT, {"messages": [{"role": 1}]}),
        (CHAT, {"messages": [turn("user", "x" * MAX_TURNS_BYTES), *TURNS]}),
        (CHAT, {**HI, "metadata": {"user_id": "u"}}),
        (COMPLETIONS, {"prompt": "once"}),
        (RESPONSES, {"input": "hi"}),
        (MESSAGES, {**HI, "metadata": {"user_id": 5}}),
        (MESSAGES, {**HI, "metadata": None}),
        (MESSAGES, {**HI, "metadata": {"user_id": ""}}),
        (EMBEDDINGS, {"input": "a", "user": "u"}),
        (TOKENIZE, {"messages": TURNS}),
    ],
)
def test_no_session(endpoint: Endpoint, body: Body) -> None:
    """There is no name and no turn of the model, or they are too long to parse, or the endpoint has no sessions."""
    assert session(body, endpoint) is None


@pytest.mark.parametrize(
    "turns, name, later",
    [
        (1, None, False),
        (2, None, False),  # the first turn with this session: the one before had none
        (4, None, True),
        (1, "mine", False),
        (2, "mine", True),
    ],
)
def test_turns_of_conversations_that_began_elsewhere(turns: int, name: str | None, later: bool) -> None:
    """A later turn without a placement shows that another gateway has answered the ones before."""
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    fields = {} if name is None else {"prompt_cache_key": name}
    context = request_context(
        parsed(CHAT, {"messages": [*said[:turns], {"role": "user"}], **fields}), Caller("team-a"), JSON
    )
    known = Affinity(METRICS)
    asked = routing_request(context, permitted_rungs(context), 0, known, True)
    assert (asked.later, asked.session_hash) == (later, None)
    if asked.session is not None:
        known.enter(lease_of(asked))
        assert not routing_request(context, permitted_rungs(context), 0, known, True).later


def lease_of(request: RoutingRequest) -> Lease:
    """A lease of the only replica."""
    lease = Lease(CANDIDATE, request, 0.0, (), lambda _: None)
    lease.replica = REPLICA
    return lease
