"""What one request may ask for: every limit, at its edge and one beyond."""

import json
from typing import Any

import pytest

from config.schema import LimitSettings
from gateway.errors import RequestError
from gateway.openai.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES, TOKENIZE, Endpoint
from gateway.openai.request import InferenceRequest, parse_request

SMALL: dict[str, Any] = {"messages": 3, "prompts": 4, "tools": 2, "stop": 2, "stop_bytes": 20}
LIMITS = LimitSettings(**SMALL, n=2, logprobs=5, prompt_logprobs=1, depth=8)
JSON = {b"content-type": b"application/json"}
LONG = "x" * 70_000


def parse(endpoint: Endpoint, **fields: Any) -> InferenceRequest:
    """Parse a request with these fields."""
    return parse_request(endpoint, json.dumps({"model": "a", **fields}).encode(), JSON, LIMITS)


def nested(levels: int) -> list[Any]:
    """Arrays in arrays."""
    return [nested(levels - 1)] if levels > 1 else []


@pytest.mark.parametrize(
    "endpoint, key, fine, too_much, words",
    [
        (CHAT, "messages", [{}] * 3, [{}] * 4, "'messages' has too many messages, the limit is 3"),
        (CHAT, "messages", [{"content": LONG}] * 3, [{"content": LONG}] * 4, "too many messages, the limit is 3"),
        (MESSAGES, "messages", [{}] * 3, [{}] * 4, "too many messages, the limit is 3"),
        (TOKENIZE, "messages", [{}] * 3, [{}] * 4, "too many messages, the limit is 3"),
        (EMBEDDINGS, "messages", [{}] * 3, [{}] * 4, "too many messages, the limit is 3"),
        (RESPONSES, "input", [{}] * 3, [{}] * 4, "'input' has too many messages, the limit is 3"),
        (RESPONSES, "input", "a,b,c,d,e", [1] * 4, "'input' has too many messages, the limit is 3"),
        (EMBEDDINGS, "input", ["a"] * 4, ["a"] * 5, "'input' has too many prompts, the limit is 4"),
        (EMBEDDINGS, "input", [1] * 100, [[1]] * 5, "'input' has too many prompts, the limit is 4"),
        (COMPLETIONS, "prompt", ["a"] * 4, ["a"] * 5, "'prompt' has too many prompts, the limit is 4"),
        (COMPLETIONS, "prompt", "a,b,c,d,e,f", [[1, 2]] * 5, "too many prompts, the limit is 4"),
        (CHAT, "tools", [{}] * 2, [{}] * 3, "'tools' has too many tools, the limit is 2"),
        (CHAT, "tools", None, [{}] * 3, "too many tools"),
        (CHAT, "stop", ["a"] * 2, ["a"] * 3, "'stop' has 3 entries, the limit is 2"),
        (COMPLETIONS, "stop", "a,b", "x" * 20, "'stop' is longer than 20 bytes"),
        (MESSAGES, "stop_sequences", None, ["a"] * 3, "'stop_sequences' has 3 entries, the limit is 2"),
        (CHAT, "stop", [], 7, "'stop': Expected"),
        (CHAT, "n", 2, 3, "'n' is 3, the limit is 2"),
        (CHAT, "n", None, "two", "'n': Expected `int | null`, got `str`"),
        (CHAT, "n", 2.0, 3.0, "'n' is 3, the limit is 2"),
        (CHAT, "n", "2", "3", "'n' is 3, the limit is 2"),
        (COMPLETIONS, "best_of", 2.0, 1e30, "'best_of': Expected `int | null`, got `float`"),
        (COMPLETIONS, "logprobs", "5", 6.0, "'logprobs' is 6, the limit is 5"),
        (CHAT, "top_logprobs", 5.0, -1.0, "'top_logprobs' is -1; give a number from 0 to 5"),
        (CHAT, "n", 0, 1.5, "'n': Expected `int | null`, got `float`"),
        (CHAT, "n", 1, 10**40, "'n' is a number of more than 18 digits, the limit is 2"),
        (COMPLETIONS, "best_of", 2, 3, "'best_of' is 3, the limit is 2"),
        (COMPLETIONS, "logprobs", 5, 6, "'logprobs' is 6, the limit is 5"),
        (CHAT, "logprobs", True, -1, "'logprobs' is -1; give a number from 0 to 5"),
        (CHAT, "top_logprobs", 5, 6, "'top_logprobs' is 6, the limit is 5"),
        (RESPONSES, "top_logprobs", 0, -1, "'top_logprobs' is -1; give a number from 0 to 5"),
        (CHAT, "top_logprobs", True, "true", "'top_logprobs': Expected `int | null`, got `str`"),
        (CHAT, "prompt_logprobs", 1, 2, "'prompt_logprobs' is 2, the limit is 1"),
        (COMPLETIONS, "prompt_logprobs", 0, -1, "'prompt_logprobs' is -1"),
    ],
)
def test_limits(endpoint: Endpoint, key: str, fine: Any, too_much: Any, words: str) -> None:
    """What is within a limit passes; what is beyond is refused by its name."""
    assert key in parse(endpoint, **{key: fine}).fields
    with pytest.raises(RequestError) as caught:
        parse(endpoint, **{key: too_much})
    assert words in caught.value.message
    assert (caught.value.param, caught.value.code) == (key, "invalid_request")


def test_alternatives_of_an_echoed_prompt() -> None:
    """With `echo`, alternatives are told of the prompt, too, and its limit counts."""
    assert parse(COMPLETIONS, logprobs=2, echo=False)
    assert parse(COMPLETIONS, logprobs=1, echo=True)
    with pytest.raises(RequestError, match="'logprobs' is 2, the limit is 1"):
        parse(COMPLETIONS, logprobs=2, echo=True)


@pytest.mark.parametrize("place", ["messages", "x"])
@pytest.mark.parametrize("beside", ["", LONG])
def test_depth(place: str, beside: str) -> None:
    """Levels count from the body itself, wherever they are."""
    assert parse(CHAT, **{place: nested(7)}, beside=beside)
    with pytest.raises(RequestError, match="deeper than 8 levels"):
        parse(CHAT, **{place: nested(8)}, beside=beside)


@pytest.mark.parametrize("levels", range(900, 1010, 3))
def test_depth_that_the_parser_hardly_bears(levels: int) -> None:
    """At the edge of what can be parsed, too, the answer is a refusal."""
    deep = "[" * levels + "]" * levels
    for body in (f'{{"model":"a","messages":{deep},"x":"{LONG}"}}', f'{{"model":"a","stop":{deep}}}'):
        with pytest.raises(RequestError):
            parse_request(CHAT, body.encode(), JSON, LIMITS)


def test_a_long_list_of_nothing_is_not_read_to_its_end() -> None:
    """A list that is far too long is given up at its first entry too many."""
    body = b'{"model":"a","messages":[' + b"0," * 10**6 + b"0]}"
    with pytest.raises(RequestError, match="too many messages, the limit is 2048"):
        parse_request(CHAT, body, JSON, LimitSettings())
