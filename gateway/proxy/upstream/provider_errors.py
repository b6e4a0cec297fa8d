"""Errors of providers, in the gateway's tree: the boundary to litellm. Pure.

litellm raises errors with a `status_code`, but calls a refused connection a 500, and puts its own names and the name of
the provider before what the provider said. Where the connection failed, its cause says so.

==================================  ======================================================================
what the provider says              error
==================================  ======================================================================
no connection                       UpstreamUnreachable
nothing for too long, 408           UpstreamTimeout
the connection ends in the middle   UpstreamDisconnected
401, 402, 403, 404                  UpstreamError `upstream_misconfigured`: credential and model are the operator's
429, 503, 529                       ReplicaFull, with its `retry-after`
another 4xx                         RequestError, with the provider's words
nothing, the request was not sent   RequestError, if its form is the reason
5xx                                 EngineError, or UpstreamError without words
==================================  ======================================================================
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from gateway.errors import (
    INVALID_JSON,
    GatewayError,
    ReplicaFull,
    RequestError,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.openai.response import error_from_response, retry_after_seconds

# Names of exceptions of httpx, aiohttp, OpenAI's SDK and botocore.
UNREACHABLE = frozenset({"ConnectError", "ConnectTimeout", "ClientConnectorError", "EndpointConnectionError"})
TIMEOUTS = frozenset({"ReadTimeout", "PoolTimeout", "WriteTimeout", "APITimeoutError", "Timeout", "TimeoutError"})
DISCONNECTED = frozenset({"ReadError", "RemoteProtocolError", "ClientPayloadError", "ServerDisconnectedError"})
MISCONFIGURED = frozenset({401, 402, 403, 404})
MALFORMED = frozenset({400, 422})
# Of code that meets a value of another type than it expects; a missing credential is none of these.
FORM_ERRORS = (TypeError, AttributeError, LookupError, json.JSONDecodeError)
CLIENTS = frozenset({"httpx", "httpcore", "openai", "anthropic", "aiohttp", "botocore", "google"})
OVERLOADED = frozenset({429, 503, 529})
# `litellm.BadRequestError: AnthropicException BadRequestError - `, in any of its forms.
_PREFIX = re.compile(r"^(?:(?:litellm\.)?\w*(?:Error|Exception)\b[\s:-]*)+")
_JSON_OBJECT = re.compile(r"\{.*\}", re.DOTALL)
TRACEBACK = "Traceback (most recent call last)"
MAX_WORDS = 2000

_OBJECT = msgspec.json.Decoder(dict[str, Any])


def error_of_provider(error: BaseException, words: str, *, sent: bool = True) -> GatewayError:
    """Translate an exception of litellm; `words` is what the provider said, if the request was `sent` to it."""
    causes = list(_causes(error))
    if not sent and _is_malformed(causes):
        return RequestError(
            "the request cannot be put into the form of the model's provider; check 'messages', 'tools' and parameters"
        )
    names = {type(each).__name__ for each in causes}
    begun = "MidStreamFallbackError" in names
    if names & UNREACHABLE:
        return UpstreamUnreachable("a connection to a provider failed")
    # The innermost is the provider's own: litellm calls some of them by other names.
    status = next((code for each in reversed(causes) if (code := _status(each))), 0)
    if names & TIMEOUTS or status == 408:
        return UpstreamTimeout("a provider sent nothing for too long")
    if names & DISCONNECTED or (begun and "APIConnectionError" in names):
        return UpstreamDisconnected("a provider closed the connection before its reply was complete")
    if "APIConnectionError" in names and not 400 <= status < 500:
        return UpstreamUnreachable("a connection to a provider failed")
    if status in MISCONFIGURED:
        return UpstreamError(
            f"a provider replied with status {status}: {_HINTS[status]}", code="upstream_misconfigured"
        )
    if status in OVERLOADED:
        return ReplicaFull(backoff_seconds=next(filter(None, map(_backoff_seconds, causes)), None))
    body = msgspec.json.encode({"error": {"message": words, "param": _param(causes)}})
    return error_from_response(status or UpstreamError.status, body)


_HINTS = {
    401: "it rejects the credential",
    402: "the account has no credit",
    403: "the credential does not permit this model",
    404: "it has no such model, or its address is wrong",
}


def words_of(text: str) -> str:
    """What a provider said: without litellm's names before it, the JSON around it, and tracebacks behind it."""
    text = _PREFIX.sub("", text.partition(TRACEBACK)[0], count=1).strip()
    match = _JSON_OBJECT.search(text)
    if match is not None:
        try:
            fields = _OBJECT.decode(match[0])
        except INVALID_JSON:
            return " ".join(text[:MAX_WORDS].split())
        inner = fields.get("error")
        message = (inner if isinstance(inner, dict) else fields).get("message")
        text = message if isinstance(message, str) else text
    return " ".join(text[:MAX_WORDS].split())


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from or while, each once."""
    seen = set[int]()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop(0)
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        original = getattr(each, "original_exception", None)
        waiting += [original if isinstance(original, BaseException) else None, each.__cause__, each.__context__]


def _is_malformed(causes: list[BaseException]) -> bool:
    """Whether litellm itself could not read a request, so that no client of a provider has seen it."""
    if any(type(each).__module__.partition(".")[0] in CLIENTS for each in causes):
        return False
    status = next((code for each in reversed(causes) if (code := _status(each))), 0)
    return status in MALFORMED or any(isinstance(each, FORM_ERRORS) for each in causes)


def _status(error: BaseException) -> int:
    status = getattr(error, "status_code", None)
    return status if isinstance(status, int) else 0


def _param(causes: list[BaseException]) -> str | None:
    params = [getattr(each, "param", None) for each in causes]
    return next((param for param in params if isinstance(param, str)), None)


def _backoff_seconds(error: BaseException) -> float | None:
    """The `retry-after` of the response that an exception is about."""
    for headers in (getattr(getattr(error, "response", None), "headers", None), getattr(error, "headers", None)):
        try:
            lines = {str(name).lower().encode(): str(value).encode() for name, value in dict(headers or {}).items()}
        except (TypeError, ValueError):
            continue
        if (seconds := retry_after_seconds(lines)) is not None:
            return seconds
    return None
