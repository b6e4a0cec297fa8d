"""Errors of providers as values: what litellm and its clients raise, and what the gateway makes of it."""

import json
from itertools import pairwise

import pytest

from gateway.errors import GatewayError
from gateway.proxy.upstream.provider_errors import error_of_provider, words_of


class APIConnectionError(Exception):
    """As OpenAI's SDK and litellm call it; what it was raised from says what happened."""


class InternalServerError(Exception):
    """litellm's, also of a refused connection."""

    status_code = 500


class MidStreamFallbackError(Exception):
    """litellm's, of a stream that had begun."""

    status_code = 503


class ConnectError(Exception):
    """httpx's."""


class ReadTimeout(Exception):
    """httpx's."""


class ServiceUnavailableError(Exception):
    """What litellm makes of a 500 of Bedrock."""

    status_code = 503


class ProviderError(Exception):
    """What a client of a provider raises."""

    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__("something")
        self.status_code, self.headers = status, headers


def raised(*errors: Exception) -> Exception:
    """The first of some exceptions, each raised from the next."""
    for outer, inner in pairwise(errors):
        outer.__cause__ = inner
    return errors[0]


@pytest.mark.parametrize(
    "error, status, code",
    [
        (raised(InternalServerError(), APIConnectionError(), ConnectError()), 502, "upstream_unreachable"),
        (raised(APIConnectionError()), 502, "upstream_unreachable"),
        (raised(InternalServerError(), ReadTimeout()), 504, "upstream_timeout"),
        (raised(MidStreamFallbackError(), APIConnectionError()), 502, "upstream_disconnected"),
        (raised(ServiceUnavailableError(), ProviderError(500)), 502, "upstream_error"),
        (ProviderError(401), 502, "upstream_misconfigured"),
        (ProviderError(402), 502, "upstream_misconfigured"),
        (ProviderError(404), 502, "upstream_misconfigured"),
        (ProviderError(408), 504, "upstream_timeout"),
        (ProviderError(422), 422, "invalid_request"),
        (ProviderError(429), 429, "overloaded"),
        (ProviderError(529), 429, "overloaded"),
        (ValueError("a defect of litellm"), 502, "upstream_error"),
    ],
)
def test_errors(error: Exception, status: int, code: str) -> None:
    """The innermost status is the provider's own; causes tell connections from answers."""
    translated = error_of_provider(error, "its words")
    assert isinstance(translated, GatewayError)
    assert (translated.status, translated.code) == (status, code)
    assert ("its words" in translated.message) == (status == 422)


class BadRequestError(Exception):
    """litellm's own, of a request that it does not understand."""

    status_code = 400


class ClientError(Exception):
    """As a client of a provider raises it."""

    status_code = 400


ClientError.__module__ = "openai._exceptions"


@pytest.mark.parametrize(
    "error, sent, status",
    [
        (raised(APIConnectionError(), AttributeError("'str' object has no attribute 'get'")), False, 400),
        (raised(APIConnectionError(), KeyError("role")), False, 400),
        (raised(APIConnectionError(), json.JSONDecodeError("x", "y", 0)), False, 400),
        (BadRequestError("litellm's words"), False, 400),
        (raised(APIConnectionError(), AttributeError("a defect")), True, 502),
        (raised(APIConnectionError(), ValueError("no credentials")), False, 502),
        (raised(APIConnectionError(), ConnectError()), False, 502),
        (ProviderError(401), False, 502),
    ],
)
def test_a_request_that_was_not_sent(error: Exception, sent: bool, status: int) -> None:
    """Its form is the client's error, and litellm's words are no provider's; a credential is the operator's."""
    translated = error_of_provider(error, "litellm's words", sent=sent)
    assert translated.status == status
    assert "words" not in translated.message or sent


def test_what_a_client_of_a_provider_raises() -> None:
    """The provider has said it, also where litellm did not report that it sent the request."""
    translated = error_of_provider(raised(BadRequestError(), ClientError()), "its words", sent=False)
    assert (translated.status, translated.message) == (400, "its words")


def test_retry_after() -> None:
    """Of the response, by any of the exceptions."""
    error = error_of_provider(raised(MidStreamFallbackError(), ProviderError(429, {"Retry-After": "7"})), "")
    assert error.headers()[0] == (b"retry-after", b"7")


def test_a_prompt_that_is_too_long() -> None:
    """It has OpenAI's code, at which agents shorten their conversation."""
    error = error_of_provider(ProviderError(400), "This model's maximum context length is 8192 tokens")
    assert (error.status, error.code) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    "text, words",
    [
        ("litellm.BadRequestError: OpenAIException - no such voice", "no such voice"),
        (
            'litellm.BadRequestError: AnthropicException - {"type":"error","error":{"type":"x","message":"too long"}}',
            "too long",
        ),
        ('litellm.X: BedrockException - {"message":"is denied"}', "is denied"),
        ("plain words", "plain words"),
        ("several\nlines\n  of it", "several lines of it"),
        ("said. Traceback (most recent call last): and so on", "said."),
        ("not {json} at all", "not {json} at all"),
    ],
)
def test_words(text: str, words: str) -> None:
    """Without litellm's names, tracebacks and JSON."""
    assert words_of(text) == words
