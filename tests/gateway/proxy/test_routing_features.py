"""What routing is told of a request, for every endpoint."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import LimitSettings
from gateway.errors import RequestError
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
from gateway.proxy.routing_features import LONGEST_ANSWER_TOKENS, LONGEST_TURNS_BYTES, asked, prompt_of
from gateway.routing.prefix_hash import BLOCK_BYTES, MAX_BLOCKS
from gateway.routing.request import Ask

JSON = {b"content-type": b"application/json"}
LIMITS = LimitSettings()

Body = dict[str, Any]


def parsed(
    endpoint: Endpoint, body: Body | bytes, may: frozenset[str] = frozenset(), most: int | None = None
) -> InferenceRequest:
    """A request as its endpoint reads it; the model's name is filled in."""
    text = body if isinstance(body, bytes) else json.dumps({"model": "m", **body}).encode()
    return parse_request(endpoint, text, JSON, LIMITS, may, most)


def ask(body: Body, endpoint: Endpoint = CHAT, key: str | None = "team-a", **headers: str) -> Ask:
    """What routing is told, at four bytes a token; headers with _ for -."""
    named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return ask_of(parsed(endpoint, body), {**JSON, **named}, key)


def ask_of(
    inference: InferenceRequest,
    headers: Mapping[bytes, bytes] = JSON,
    key: str | None = None,
    *,
    with_blocks: bool = True,
) -> Ask:
    """What routing is told of a request, of a model whose tokens have four bytes."""
    return asked(inference, prompt_of(inference), headers, key, 4.0, with_blocks=with_blocks)


def session(body: Body, endpoint: Endpoint = CHAT, key: str | None = "team-a", **headers: str) -> str | None:
    """Whose turn it is."""
    return ask(body, endpoint, key, **headers).session


def says(role: str, content: Any) -> Body:
    """A turn."""
    return {"role": role, "content": content}


TURNS = [
    says("user", "Hi"),
    says("assistant", "Hello!"),
    says("user", "A joke?"),
    says("assistant", "No."),
    says("user", "!"),
]


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
    """Its parts as they came, in the order of chat templates, and their length."""
    inference = parsed(endpoint, body)
    assert b"".join(prompt_of(inference).parts).decode() == prompt
    assert prompt_of(inference).text_bytes == len(prompt)
    assert ask(body, endpoint).prompt_tokens == len(prompt) / 4


@pytest.mark.parametrize("endpoint, key", [(COMPLETIONS, "prompt"), (EMBEDDINGS, "input")])
@pytest.mark.parametrize("ids, count", [([7], 1), ([7, 8, 9], 3), ([[7, 8], [9]], 3), ([[7]], 1)])
def test_token_ids_are_counted(endpoint: Endpoint, key: str, ids: Any, count: int) -> None:
    """However they are written; as text they are no measure of anything."""
    for indent in (None, 2):
        inference = parsed(endpoint, json.dumps({"model": "m", key: ids}, indent=indent).encode())
        assert ask_of(inference).prompt_tokens == count
        assert prompt_of(inference).text_bytes == 0


@pytest.mark.parametrize("prompt", ["[7, 8]", ["7, 8"], [], ["[1, 2]"]])
def test_text_that_looks_like_token_ids(prompt: Any) -> None:
    """Only numbers are counted."""
    assert ask({"prompt": prompt}, COMPLETIONS).prompt_tokens == len(json.dumps(prompt)) / 4


@pytest.mark.parametrize(
    "endpoint, body, most, answer_tokens",
    [
        (CHAT, {}, None, None),
        (CHAT, {}, 500, 500),
        (CHAT, {"max_tokens": 7}, 500, 7),
        (CHAT, {"max_tokens": 7}, None, 7),
        (CHAT, {"max_tokens": 7, "max_completion_tokens": 9}, None, 9),
        (CHAT, {"max_tokens": 7, "max_completion_tokens": None}, None, 7),
        (CHAT, {"max_tokens": "many"}, None, None),
        (CHAT, {"max_tokens": -1}, None, None),
        (CHAT, {"max_tokens": 10**300}, None, LONGEST_ANSWER_TOKENS),
        (COMPLETIONS, {}, None, 16),
        (COMPLETIONS, {}, 8, 8),
        (COMPLETIONS, {}, 500, 16),
        (COMPLETIONS, {"max_tokens": 100}, None, 100),
        (RESPONSES, {"max_output_tokens": 5, "max_tokens": 9}, None, 5),
        (MESSAGES, {"max_tokens": 5}, None, 5),
        (EMBEDDINGS, {"max_tokens": 5}, None, None),
    ],
)
def test_the_longest_answer(endpoint: Endpoint, body: Body, most: int | None, answer_tokens: int | None) -> None:
    """The client's length, or its key's, or the engine's own; what is no length is for the replica to refuse."""
    assert ask_of(parsed(endpoint, body, most=most)).answer_tokens == answer_tokens


def test_blocks_grow_with_the_conversation() -> None:
    """A turn more leaves all blocks but the one with the old end; without being asked for, there are none."""
    long = [says("user", "x" * 1000), says("assistant", "y" * 1000)]
    before, after = ask({"messages": long}).blocks, ask({"messages": [*long, says("user", "z" * 1000)]}).blocks
    assert len(before) == len(json.dumps(long)) // BLOCK_BYTES
    assert after[: len(before) - 1] == before[:-1]
    assert ask_of(parsed(CHAT, {"messages": long}), with_blocks=False).blocks == ()


def test_which_prompts_have_blocks() -> None:
    """The first 64 KiB of what is generated from; tools come first; another `cache_salt` is another cache."""
    messages = [says("user", "x" * 100_000)]
    assert len(ask({"messages": messages}).blocks) == MAX_BLOCKS
    assert ask({"input": "x" * 1000}, EMBEDDINGS).blocks == ()
    tools = [{"name": "y" * 1000}]
    assert ask({"messages": messages, "tools": tools}).blocks[0] == ask({"messages": [], "tools": tools}).blocks[0]
    may = frozenset({"cache_salt"})
    salted = [parsed(CHAT, {"messages": messages, "cache_salt": salt}, may) for salt in ("a", "b", "b")]
    one, other, same = (ask_of(inference).blocks for inference in salted)
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
    """A name makes one session of all turns, of a fixed length, and another for each API key."""
    headers = {} if header is None else {"x_session_id": header}
    name = session(body, endpoint, **headers)
    assert name is not None
    assert len(name) == 32
    assert session({**body, "temperature": 1}, endpoint, **headers) == name
    others = {session(body, endpoint, key, **headers) for key in ("team-b", "team", "", None)}
    assert name not in others
    assert len(others) == 3  # no key's name is empty


def test_the_first_name_counts() -> None:
    """Header, `prompt_cache_key`, `user`; and empty ones don't."""
    named = {"prompt_cache_key": "k", "user": "u", "messages": TURNS}
    assert session(named, x_session_id="h") == session(HI, x_session_id="h") != session(named)
    assert session(named) == session({"prompt_cache_key": "k", **HI})
    assert session({**named, "prompt_cache_key": None}) == session({"user": "u", **HI})
    assert session({**named, "prompt_cache_key": "", "user": ""}) == session({"messages": TURNS})
    assert session({**HI, "user": None}, x_session_id="") is None


@pytest.mark.parametrize("size", [257, 5000, 200_000])
def test_long_names(size: int) -> None:
    """They are hashed all the same, and differ by what is at either end, and by length."""
    names = ["x" * size, "y" + "x" * (size - 1), "x" * (size - 1) + "y", "x" * (size + 1)]
    assert len({session(HI, x_session_id=name) for name in names}) == 4
    assert len({session({**HI, "user": name}) for name in names}) == 4
    assert len(session(HI, x_session_id=names[0]) or "") == 32


def test_no_key_reaches_another_ones_session() -> None:
    """Not by a name that begins like the other key's."""
    assert session(HI, key="a", x_session_id="b c") != session(HI, key="a b", x_session_id="c")
    assert session(HI, key="a", x_session_id="1 a") != session(HI, key="a 1", x_session_id="a")


ITEMS = [
    says("user", "Weather?"),
    {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "sun"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Sun."}]},
    says("user", "And tomorrow?"),
]


@pytest.mark.parametrize(
    "endpoint, key, turns, first",
    [
        (CHAT, "messages", TURNS, 2),
        (CHAT, "messages", [says("system", "Be brief."), *TURNS], 3),
        (CHAT, "messages", [says("user", '"role": "assistant"'), *TURNS], 3),
        (CHAT, "messages", [{"content": "Hi", "role": "user"}, {"content": None, "role": "assistant"}, *TURNS], 2),
        (CHAT, "messages", [says("user", "x" * 100_000), *TURNS], 3),
        (RESPONSES, "input", TURNS, 2),
        (RESPONSES, "input", ITEMS, 2),
        (MESSAGES, "messages", [says("user", [{"type": "text", "text": "Hi"}]), *TURNS], 3),
    ],
)
def test_a_conversation_is_known_by_its_first_turns(
    endpoint: Endpoint, key: str, turns: list[Body], first: int
) -> None:
    """None before the model's first turn; from then on the same one, whatever comes after; another for another."""
    sessions = [session({key: turns[:count]}, endpoint) for count in range(1, len(turns) + 1)]
    assert sessions[: first - 1] == [None] * (first - 1)
    assert len(set(sessions[first - 1 :])) == 1
    assert session({key: turns}, endpoint, "team-b") != sessions[-1]
    changed = [{**turns[0], "name": "other"}, *turns[1:]]
    assert session({key: changed}, endpoint) not in {None, sessions[-1]}
    told_otherwise = [*turns[: first - 1], {**turns[first - 1], "name": "other"}, *turns[first:]]
    assert session({key: told_otherwise}, endpoint) not in {None, sessions[-1]}


def test_instructions_are_part_of_a_conversation_and_tools_are_not() -> None:
    """A client may learn tools on the way."""
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
        (CHAT, {"messages": [says("user", "Hi"), says("user", '{"role":"assistant"}')]}),
        (CHAT, {"messages": [{"role": 1}]}),
        (CHAT, {"messages": [says("user", "x" * LONGEST_TURNS_BYTES), *TURNS]}),
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
    """No name and no turn of the model, too much to look through, or nothing that could stay anywhere."""
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
def test_whatever_is_accepted_can_be_summed_up(endpoint: Endpoint, fields: dict[str, str], header: bytes) -> None:
    """No body or header makes the gateway itself fail, or tells routing a number that it can't count with."""
    body = ",".join(['{"model":"m"', *(f'"{key}":{value}' for key, value in fields.items())]) + "}"
    try:
        inference = parsed(endpoint, body.encode(), frozenset({"cache_salt"}))
    except RequestError:
        return
    told = ask_of(inference, {**JSON, b"x-session-id": header}, "k")
    assert 0 <= told.prompt_tokens <= len(body)
    assert told.answer_tokens is None or 0 < told.answer_tokens <= LONGEST_ANSWER_TOKENS
    assert told.session is None or len(told.session) == 32


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 2**20}},
        {"type": "input_audio", "input_audio": {"data": "A" * 2**20, "format": "wav"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 2**20}},
    ],
)
@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":")])
def test_a_picture_is_no_long_text(part: Body, separators: tuple[str, str]) -> None:
    """As text it would look like minutes of reading, for which all others would be sent elsewhere, or away."""
    words = "word " * 10_000
    body = {"model": "m", "messages": [says("user", [part, {"type": "text", "text": words}])]}
    inference = parsed(CHAT, json.dumps(body, separators=separators).encode())
    tokens = ask_of(inference).prompt_tokens
    assert 12_500 < tokens < 12_500 + 1_200
    assert prompt_of(inference).text_bytes == tokens * 4
    # One word that begins like data, and is as long as words are.
    assert ask({"messages": [says("user", words + ";base64," + words)]}).prompt_tokens > 20_000 / 2
