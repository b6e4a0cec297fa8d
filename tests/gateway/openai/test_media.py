"""Media URLs in messages: data: always, the web only where the operator permits a domain."""

import json
from typing import Any

import pytest

from config.schema import LimitSettings
from gateway.errors import RequestError
from gateway.openai.endpoints import CHAT, EMBEDDINGS, MESSAGES, RESPONSES, TOKENIZE, Endpoint
from gateway.openai.media import MAX_PARTS
from gateway.openai.request import InferenceRequest, parse_request

JSON = {b"content-type": b"application/json"}
DOMAINS = ("images.example.com", "10.0.0.7")
DATA = "data:image/png;base64,AAAA"


def parsed(endpoint: Endpoint, body: dict[str, Any] | bytes, domains: tuple[str, ...] = ()) -> InferenceRequest:
    """Parse a body with these domains permitted."""
    text = body if isinstance(body, bytes) else json.dumps({"model": "a", **body}).encode()
    return parse_request(endpoint, text, JSON, LimitSettings(), media_domains=domains)


def chat(part: Any) -> dict[str, Any]:
    """A conversation with a part in its last message."""
    first = {"role": "user", "content": 'what is in "url"?'}
    return {"messages": [first, {"role": "user", "content": [{"type": "text", "text": "see"}, part]}]}


def carriers(url: str) -> list[tuple[Endpoint, dict[str, Any]]]:
    """Every place in which vLLM looks for a URL."""
    anthropic = {"type": "image", "source": {"type": "url", "url": url}}
    item = {"type": "input_image", "image_url": url}
    image = chat({"type": "image_url", "image_url": {"url": url, "detail": "auto"}})
    return [
        (CHAT, image),
        (TOKENIZE, image),
        (EMBEDDINGS, image),
        (CHAT, chat({"image_url": url, "uuid": "1"})),
        (CHAT, chat({"type": "audio_url", "audio_url": {"url": url}})),
        (CHAT, chat({"type": "video_url", "video_url": {"url": url}})),
        (MESSAGES, chat(anthropic)),
        (MESSAGES, chat({"type": "tool_result", "tool_use_id": "1", "content": [anthropic]})),
        (RESPONSES, {"input": [{"role": "user", "content": [item]}]}),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "1", "output": [item]}]}),
        (RESPONSES, {"input": "x", "previous_input_messages": [{"role": "user", "content": [item]}]}),
    ]


@pytest.mark.parametrize("number", range(len(carriers(""))))
@pytest.mark.parametrize("url", ["http://images.example.com/a.png", "https://IMAGES.example.com:8443?a=b"])
def test_a_url_needs_a_permitted_domain(number: int, url: str) -> None:
    """Without any, and with others, a URL is refused with the option's name; `data:` never is."""
    endpoint, body = carriers(url)[number]
    assert parsed(endpoint, body, DOMAINS)
    for domains, words in (((), "only data: URLs are permitted"), (("example.com",), "domains are example.com")):
        with pytest.raises(RequestError) as caught:
            parsed(endpoint, body, domains)
        assert words in caught.value.message
        assert "(gateway.media_domains)" in caught.value.message
        assert (caught.value.status, caught.value.code) == (400, "media_url_not_allowed")
        assert caught.value.param in body
    assert parsed(*carriers(DATA)[number])
    assert parsed(*carriers("DATA:image/png;base64,AAAA")[number])


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://images.example.com.evil.example/",
        "http://images.example.com@evil.example/",
        "http://evil.example/?http://images.example.com/",
        "http://evil.example\\@images.example.com/",
        "http://evil.example#images.example.com",
        "http://images.example.com.:80/",
        "http://[::1]/",
        "file:///etc/passwd",
        "ftp://images.example.com/a",
        "//images.example.com/a",
        " http://images.example.com/a",
        "images.example.com/a",
        "",
    ],
)
def test_what_is_not_a_url_of_a_permitted_domain(url: str) -> None:
    """Whatever another parser might take for another host is refused."""
    with pytest.raises(RequestError, match="media URL"):
        parsed(CHAT, chat({"type": "image_url", "image_url": {"url": url}}), DOMAINS)


def test_an_escaped_key_hides_nothing() -> None:
    """JSON may write any letter of a key as an escape."""
    text = b'{"model":"a","messages":[{"content":[{"image\\u005f\\u0075rl":{"u\\u0072l":"http://evil.example/"}}]}]}'
    with pytest.raises(RequestError, match=r"evil\.example"):
        parsed(CHAT, text)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "http://evil.example/ is a url"}]},
        chat({"type": "text", "text": '{"image_url": "http://evil.example/"}'}),
        chat(
            {"type": "tool_use", "id": "1", "name": "get", "input": {"url": "http://evil.example/", "image_url": "x"}}
        ),
        chat({"type": "search_result", "source": "https://docs.example/", "content": []}),
        chat({"type": "output_text", "annotations": [{"type": "url_citation", "url": "https://docs.example/"}]}),
        chat({"type": "image_url", "image_url": {"url": None}}),
        chat({"type": "image_url", "image_url": 7}),
        {**chat({}), "tools": [{"function": {"parameters": {"properties": {"image_url": {"type": "string"}}}}}]},
        {"messages": "url", "metadata": {"url": "http://evil.example/"}},
    ],
)
def test_what_is_no_media(body: dict[str, Any]) -> None:
    """URLs in texts, tools and arguments of calls are nobody's media."""
    assert parsed(CHAT, {"x": '"url"', **body}).fields


def test_more_parts_than_are_looked_at() -> None:
    """A URL cannot hide behind many parts."""
    parts = [{"type": "text", "text": "a"}] * MAX_PARTS
    assert parsed(CHAT, {"messages": [{"content": parts, "name": "url"}]})
    with pytest.raises(RequestError, match="more than 4096 entries"):
        parsed(CHAT, {"messages": [{"content": [*parts, {"image_url": "http://evil.example/"}]}]})
