"""What routing derives from a request, for every endpoint."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import Floor
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
from gateway.openai.request import parse_request
from gateway.proxy.affinity import Affinity
from gateway.proxy.routing_features import (
    MAX_ANSWER_TOKENS,
    permitted_rungs,
    prompt_parts,
    routing_request,
)
from gateway.routing.prefix_index import BLOCK_BYTES, MAX_BLOCKS
from tests.gateway.proxy.contexts import LO, METRICS, SMOL, request_context
from tests.gateway.proxy.features import JSON, LIMITS, TURNS, Body, parsed, routed, routed_inference, turn


def test_identity_and_constraints() -> None:
    """The request keeps its turn, id, key, size and constraints, and the rungs that satisfy them."""
    floor = Floor(top1_agreement=0.9)
    body = json.dumps({"model": "m", "messages": TURNS, "stream": True}).encode()
    inference = parse_request(CHAT, body, {**JSON, b"x-quantgate-precision": b"int4"}, LIMITS)
    context = request_context(inference, Caller("team-a", floor=floor), JSON)
    context.body_bytes = len(body)
    request = routing_request(context, permitted_rungs(context), 7, Affinity(METRICS), True)
    assert (request.target, request.rungs) == (SMOL, (LO,))
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
