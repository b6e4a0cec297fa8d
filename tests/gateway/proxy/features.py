"""Requests, and what routing derives from them, for tests of routing features."""

import json
from collections.abc import Mapping
from typing import Any

from config.schema import LimitSettings
from gateway.keys import Caller
from gateway.openai.endpoints import (
    CHAT,
    Endpoint,
)
from gateway.openai.request import InferenceRequest, parse_request
from gateway.proxy.affinity import Affinity
from gateway.proxy.routing_features import (
    permitted_rungs,
    routing_request,
)
from gateway.routing.request import RoutingRequest
from tests.gateway.proxy.contexts import METRICS, request_context

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

HI = {"messages": TURNS[:1]}
