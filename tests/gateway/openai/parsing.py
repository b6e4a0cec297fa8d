"""Requests as clients send them."""

from hypothesis import strategies as st

from config.schema import LimitSettings
from gateway.openai.endpoints import CHAT, Endpoint
from gateway.openai.request import InferenceRequest, parse_request

LIMITS = LimitSettings(n=4)


JSON = {b"content-type": b"application/json"}


def parse(
    body: str | bytes,
    endpoint: Endpoint = CHAT,
    caller_may: frozenset[str] = frozenset(),
    max_tokens: int | None = None,
    **headers: str,
) -> InferenceRequest:
    """Parse a body as an endpoint does; headers with _ for -."""
    data = body.encode() if isinstance(body, str) else body
    named = {name.replace("_", "-").encode(): value.encode("latin-1") for name, value in headers.items()}
    return parse_request(endpoint, data, {**JSON, **named}, LIMITS, caller_may, max_tokens)


# None of them is a key that we read.
names = st.text(st.characters(codec="utf-8", exclude_characters='"\\', min_codepoint=32), max_size=8).map("x{}".format)
