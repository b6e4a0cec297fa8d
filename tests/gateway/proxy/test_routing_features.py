"""What routing derives from a request, for every endpoint."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import Floor, LimitSettings
from gateway.errors import FloorUnmet, RequestError
from gateway.keys import Caller
from gateway.openai.endpoints import (
    CHAT,
    COMPLETIONS,
    COUNT_TOKENS,
    DETOKENIZE,
    EMBEDDINGS,
    ENDPOINTS,
    MESSAGES,
    RESPONSES,
    TOKENIZE,
    Endpoint,
)
from gateway.openai.request import InferenceRequest, parse_request
from gateway.proxy.affinity import Affinity
from gateway.proxy.leases import Lease
from gateway.proxy.routing_features import (
    MAX_ANSWER_TOKENS,
    MAX_TURNS_BYTES,
    permitted_rungs,
    prompt_parts,
    routing_request,
)
from gateway.routing.prefix_index import BLOCK_BYTES, MAX_BLOCKS
from gateway.routing.request import RoutingRequest
from gateway.routing.sessions import Placement
from gateway.routing.spill import PAUSE_SECONDS
from gateway.routing.split import Rung
from tests.gateway.proxy.contexts import CANDIDATE, LO, METRICS, REPLICA, SMOL, request_context

JSON = {b"content-type": b"application/json"}
LIMITS = LimitSettings()

Body = dict[str, Any]


def parsed(
    endpoint: Endpoint, body: Body | bytes, may: frozenset[str] = frozenset(), max_tokens: int | None = None
) -> InferenceRequest:
    """A request as its endpoint parses it; the model's name is filled in."""
    text = body if isinstance(body, bytes) else json.dumps({"model": "m", **body}).encode()
    return parse_request(endpoint, text, JSON, LIMITS, may, max_tokens)


def routed(body: Body, endpoint: Endpoint = CHAT, key: str | None = "team-a", **headers: str) -> RoutingRequest:
    """The routing request of a body, at four bytes per token; header names have _ for -."""
    named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return routed_inference(parsed(endpoint, body), {**JSON, **named}, key)


def routed_inference(
    inference: InferenceRequest,
    headers: Mapping[bytes, bytes] = JSON,
    key: str | None = None,
    *,
    with_blocks: bool = True,
) -> RoutingRequest:
    """The routing request of a parsed request, for a model whose tokens have four bytes."""
    context = request_context(inference, Caller(key), headers)
    return routing_request(context, permitted_rungs(context), 0, Affinity(METRICS), with_blocks)


def session(body: Body, endpoint: Endpoint = CHAT, key: str | None = "team-a", **headers: str) -> str | None:
    """The session of a body."""
    return routed(body, endpoint, key, **headers).session


def turn(role: str, content: Any) -> Body:
    """A turn of a conversation."""
    return {"role": role, "content": content}


TURNS = [
    turn("user", "Hi"),
    turn("assistant", "Hello!"),
    turn("user", "A joke?"),
    turn("assistant", "No."),
    turn("user", "!"),
]


def test_identity_and_constraints() -> None:
    """The request keeps its turn, id, key, size and constraints, and the rungs that satisfy them."""
    floor = Floor(top1_agreement=0.9)
    body = json.dumps({"model": "m", "messages": TURNS, "stream": True}).encode()
    inference = parse_request(CHAT, body, {**JSON, b"x-quantgate-precision": b"int4"}, LIMITS)
    context = request_context(inference, Caller("team-a", floor=floor), JSON)
    context.body_bytes = len(body)
    request = routing_request(context, permitted_rungs(context), 7, Affinity(METRICS), True)
    assert (request.target, request.rungs) == (SMOL, (Rung.of(LO),))
    assert (request.turn, request.request_id, request.key) == (7, "r-1", "team-a")
    assert (request.streams, request.body_bytes, request.tried) == (True, len(body), frozenset())
    assert (request.floors, request.precisions) == ((floor, inference.floor), frozenset({"int4"}))
    too_high = request_context(inference, Caller("team-a", floor=Floor(top1_agreement=0.95)), JSON)
    with pytest.raises(FloorUnmet):
        permitted_rungs(too_high)


@pytest.mark.parametrize(
    "endpoint, body, prompt",
    [
        (CHAT, {"messages": [1], "temperature": 0, "tools": [2]}, "[2][1]"),
        (CHAT, {"messages": [1], "prompt": "not read here", "user": "u"}, "[1]"),
        (COMPLETIONS, {"prompt": "once", "suffix": "end"}, '"once"'),
        (COMPLETIONS, {"prompt": ["a", "b"]}, '["a", "b"]'),
        (COMPLETIONS, {}, ""),
        (RESPONSES, {"input": "hi", "instructions": "be brief"}, '"be brief""hi"'),
        (RESPONSES, {"input": [1], "tools": [2], "instructions": "x"}, '[2]"x"[1]'),
        (MESSAGES, {"messages": [1], "system": "s", "tools": [2]}, '[2]"s"[1]'),
        (MESSAGES, {"messages": [1], "system": [{"text": "s"}]}, '[{"text": "s"}][1]'),
        (EMBEDDINGS, {"input": ["a", "b"]}, '["a", "b"]'),
        (EMBEDDINGS, {"messages": [1]}, "[1]"),
        # The engine answers these without reading a prompt.
        (COUNT_TOKENS, {"messages": [1], "system": "s"}, ""),
        (TOKENIZE, {"prompt": "once"}, ""),
        (DETOKENIZE, {"tokens": [1, 2]}, ""),
    ],
)
def test_the_prompt(endpoint: Endpoint, body: Body, prompt: str) -> None:
    """Its parts are unchanged, in the order of chat templates; its length is theirs."""
    assert b"".join(prompt_parts(parsed(endpoint, body))).decode() == prompt
    assert routed(body, endpoint).prompt_bytes == len(prompt)
    assert routed(body, endpoint).prompt_tokens == len(prompt) / 4


@pytest.mark.parametrize("endpoint, key", [(COMPLETIONS, "prompt"), (EMBEDDINGS, "input")])
@pytest.mark.parametrize("ids, count", [([7], 1), ([7, 8, 9], 3), ([[7, 8], [9]], 3), ([[7]], 1)])
def test_token_ids_are_counted(endpoint: Endpoint, key: str, ids: Any, count: int) -> None:
    """Whitespace makes no difference; their bytes say nothing about the bytes of a token."""
    for indent in (None, 2):
        inference = parsed(endpoint, json.dumps({"model": "m", key: ids}, indent=indent).encode())
        assert routed_inference(inference).prompt_tokens == count
        assert routed_inference(inference).prompt_bytes == 0


@pytest.mark.parametrize("prompt", ["[7, 8]", ["7, 8"], [], ["[1, 2]"]])
def test_text_that_looks_like_token_ids(prompt: Any) -> None:
    """Only numbers are counted."""
    assert routed({"prompt": prompt}, COMPLETIONS).prompt_tokens == len(json.dumps(prompt)) / 4


@pytest.mark.parametrize(
    "endpoint, body, max_tokens, answer_tokens",
    [
        (CHAT, {}, None, None),
        (CHAT, {}, 500, 500),
        (CHAT, {"max_tokens": 7}, 500, 7),
        (CHAT, {"max_tokens": 7}, None, 7),
        (CHAT, {"max_tokens": 7, "max_completion_tokens": 9}, None, 9),
        (CHAT, {"max_tokens": 7, "max_completion_tokens": None}, None, 7),
        (CHAT, {"max_tokens": "many"}, None, None),
        (CHAT, {"max_tokens": -1}, None, None),
        (CHAT, {"max_tokens": 10**300}, None, MAX_ANSWER_TOKENS),
        (COMPLETIONS, {}, None, 16),
        (COMPLETIONS, {}, 8, 8),
        (COMPLETIONS, {}, 500, 16),
        (COMPLETIONS, {"max_tokens": 100}, None, 100),
        (RESPONSES, {"max_output_tokens": 5, "max_tokens": 9}, None, 5),
        (MESSAGES, {"max_tokens": 5}, None, 5),
        (EMBEDDINGS, {"max_tokens": 5}, None, None),
    ],
)
def test_the_longest_answer(endpoint: Endpoint, body: Body, max_tokens: int | None, answer_tokens: int | None) -> None:
    """The client's limit counts, then its key's, then the engine's own; the engine refuses an invalid one."""
    assert routed_inference(parsed(endpoint, body, max_tokens=max_tokens)).answer_tokens == answer_tokens


def test_blocks_grow_with_the_conversation() -> None:
    """Another turn changes only the block with the old end; without `with_blocks` there are none."""
    long = [turn("user", "x" * 1000), turn("assistant", "y" * 1000)]
    before = routed({"messages": long}).blocks
    after = routed({"messages": [*long, turn("user", "z" * 1000)]}).blocks
    assert len(before) == len(json.dumps(long)) // BLOCK_BYTES
    assert after[: len(before) - 1] == before[:-1]
    assert routed_inference(parsed(CHAT, {"messages": long}), with_blocks=False).blocks == ()


def test_which_prompts_have_blocks() -> None:
    """The first 64 KiB of prompts that are generated from, tools first; another `cache_salt` is another cache."""
    messages = [turn("user", "x" * 100_000)]
    assert len(routed({"messages": messages}).blocks) == MAX_BLOCKS
    assert routed({"input": "x" * 1000}, EMBEDDINGS).blocks == ()
    tools = [{"name": "y" * 1000}]
    first = routed({"messages": messages, "tools": tools}).blocks[0]
    assert first == routed({"messages": [], "tools": tools}).blocks[0]
    may = frozenset({"cache_salt"})
    salted = [parsed(CHAT, {"messages": messages, "cache_salt": salt}, may) for salt in ("a", "b", "b")]
    one, other, same = (routed_inference(inference).blocks for inference in salted)
    assert set(one).isdisjoint(other)
    assert other == same


HI = {"messages": TURNS[:1]}


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


pieces = st.sampled_from(
    [
        *('"a"', "null", "true", "1", "-1", "1e400", "1" * 5000, "[]", "{}", '["a"]', "[1]", "[[1],[]]", '"\\ud800"'),
        *(
            '[{"role":"assistant"}]',
            '[{"role":"\\ud800"}]',
            '{"user_id":"\\ud800"}',
            '[{"type":5}]',
            "[" * 60 + "]" * 60,
        ),
        *('{"user_id":"u","user_id":"v"}', '[{"role":"user","role":"assistant"}]', '"é"'),
    ]
)
keys = st.sampled_from(
    [
        *("messages", "input", "prompt", "tools", "system", "instructions", "metadata", "user", "prompt_cache_key"),
        *("safety_identifier", "max_tokens", "max_completion_tokens", "max_output_tokens", "cache_salt"),
    ]
)


@given(st.sampled_from(list(ENDPOINTS.values())), st.dictionaries(keys, pieces), st.binary(max_size=300))
def test_every_accepted_request_can_be_routed(endpoint: Endpoint, fields: dict[str, str], header: bytes) -> None:
    """No body or header raises, or results in a number that routing cannot use."""
    body = ",".join(['{"model":"m"', *(f'"{key}":{value}' for key, value in fields.items())]) + "}"
    try:
        inference = parsed(endpoint, body.encode(), frozenset({"cache_salt"}))
    except RequestError:
        return
    request = routed_inference(inference, {**JSON, b"x-session-id": header}, "k")
    assert 0 <= request.prompt_tokens <= len(body)
    assert request.answer_tokens is None or 0 < request.answer_tokens <= MAX_ANSWER_TOKENS
    assert request.session is None or len(request.session) == 32


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 2**20}},
        {"type": "input_audio", "input_audio": {"data": "A" * 2**20, "format": "wav"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 2**20}},
    ],
)
@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":")])
def test_an_image_is_not_a_long_text(part: Body, separators: tuple[str, str]) -> None:
    """As text it would look like minutes of work, and other requests would spill or be refused."""
    words = "word " * 10_000
    body = {"model": "m", "messages": [turn("user", [part, {"type": "text", "text": words}])]}
    inference = parsed(CHAT, json.dumps(body, separators=separators).encode())
    request = routed_inference(inference)
    assert 12_500 < request.prompt_tokens < 12_500 + 1_200
    assert request.prompt_bytes == request.prompt_tokens * 4
    # A mark of data within a text, before the next quote.
    assert routed({"messages": [turn("user", words + ";base64," + words)]}).prompt_tokens > 20_000 / 2
