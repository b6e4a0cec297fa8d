"""What a replica's bytes become: the asked model's name, our error shape, and nothing else."""

import json

import msgspec
import pytest

from gateway.errors import ReplicaFull, RequestError, UpstreamError
from gateway.openai.response import (
    error_from_response,
    finish_reason,
    parse_response,
    retry_after_seconds,
    rewrite_response,
)
from gateway.openai.usage import CompletionDetails, Usage

WHOLE = (
    '{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m1","choices":[{"message":{"content":'
    '"\\"model\\":\\"m1\\" café \\u00e9"},"logprobs":{"x":[-0.0,1E5,123456789012345678901]}}],'
    '"usage":{"prompt_tokens":61,"total_tokens":77,"completion_tokens":16,'
    '"completion_tokens_details":{"reasoning_tokens":2},"prompt_tokens_details":null},"kv_transfer_params":null}'
)


@pytest.mark.parametrize("model", ["smol", "team/small", 'q"\\uote', "汉字", "a\\1"])
def test_only_the_name_changes_in_a_whole_answer(model: str) -> None:
    """The asked name comes back; all other bytes of a compact answer stay, and usage is read."""
    body, usage = rewrite_response(parse_response(WHOLE.encode()), model)
    name = msgspec.json.encode(model).decode()
    assert body.decode() == WHOLE.replace('"model":"m1"', f'"model":{name}', 1)
    assert json.loads(body)["model"] == model
    assert usage == Usage(61, 16, CompletionDetails(2))


def test_usage_may_be_missing() -> None:
    """An answer without usage, or with null for it, is passed on."""
    assert rewrite_response(parse_response(b'{"model":"m1"}'), "smol") == (b'{"model":"smol"}', None)
    assert rewrite_response(parse_response(b'{"model":"m1","usage":null}'), "smol") == (
        b'{"model":"smol","usage":null}',
        None,
    )
    assert rewrite_response(parse_response(b'{"model":"m1","usage":{"prompt_tokens":null}}'), "m")[1] == Usage(None, 0)


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b'{"model"', b'{"\xff":1}', b'{"a":' + b"[" * 100_000])
def test_an_answer_that_is_no_object_is_a_failure(body: bytes) -> None:
    """Another replica may be asked when the answer makes no sense."""
    with pytest.raises(UpstreamError) as caught:
        rewrite_response(parse_response(body), "smol")
    assert (caught.value.status, caught.value.code) == (502, "upstream_invalid")


VLLM_404 = b'{"error":{"message":"The model `m` does not exist.","type":"NotFoundError","param":"model","code":404}}'
TOO_LONG = b'{"error":{"message":"too long","type":"BadRequestError","param":"input_tokens","code":400}}'


@pytest.mark.parametrize(
    "status, body, shown",
    [
        (400, TOO_LONG, ("too long", "BadRequestError", "input_tokens", "invalid_request")),
        (400, TOO_LONG.replace(b"400", b'"400"'), ("too long", "BadRequestError", "input_tokens", "invalid_request")),
        (
            400,
            TOO_LONG.replace(b"too long", b"This model's maximum context length is 9 tokens."),
            (
                "This model's maximum context length is 9 tokens.",
                *("BadRequestError", "input_tokens", "context_length_exceeded"),
            ),
        ),
        (400, TOO_LONG.replace(b"400", b'"too_long"'), ("too long", "BadRequestError", "input_tokens", "too_long")),
        (400, TOO_LONG.replace(b"400", b"null"), ("too long", "BadRequestError", "input_tokens", "invalid_request")),
        (422, b'{"detail":"no field"}', ("no field", "invalid_request_error", None, "invalid_request")),
        (422, b'{"detail":[{"msg":"x"}]}', ("[{'msg': 'x'}]", "invalid_request_error", None, "invalid_request")),
        (400, b'{"error":"plain"}', ("plain", "invalid_request_error", None, "invalid_request")),
        (
            405,
            b"<html>",
            ("the engine rejected the request with status 405", *("invalid_request_error", None), "invalid_request"),
        ),
        (
            413,
            b"",
            ("the engine rejected the request with status 413", *("invalid_request_error", None), "invalid_request"),
        ),
        (
            400,
            b'{"error":{}}',
            ("the engine rejected the request with status 400", *("invalid_request_error", None), "invalid_request"),
        ),
    ],
)
def test_a_clients_mistake_is_passed_on(status: int, body: bytes, shown: tuple[str, str, str | None, str]) -> None:
    """A 4xx keeps its status and its words, in OpenAI's shape with a string code, and is not asked for again."""
    error = error_from_response(status, body)
    assert isinstance(error, RequestError)
    assert error.status == status
    assert (error.message, error.type, error.param, error.code) == shown


@pytest.mark.parametrize("status", [201, 204, 301, 307, 401, 403, 500, 501, 502, 504, 599])
@pytest.mark.parametrize("body", [b'{"error":"Unauthorized"}', VLLM_404, b"secret", b""])
def test_a_failing_replica_tells_nothing(status: int, body: bytes) -> None:
    """What is not the client's mistake is a failure of ours: another replica may be asked, no text gets out."""
    error = error_from_response(status, body)
    assert isinstance(error, UpstreamError)
    assert error.status == 502
    assert str(status) in error.message
    assert not {"Unauthorized", "exist", "secret"} & set(error.body().decode().split())


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_replica(status: int) -> None:
    """429 and 503 mean: another one may have room, or the client should come back; no failure of anybody."""
    error = error_from_response(status, b'{"error":{"message":"The engine is busy"}}')
    assert isinstance(error, ReplicaFull)
    assert (error.status, error.code) == (429, "overloaded")
    assert error.headers() == [(b"retry-after", b"1"), (b"x-should-retry", b"true")]


def test_an_endpoint_that_the_engine_lacks() -> None:
    """A model of another kind has no such endpoint: that is the client's to mend, and no failure of the replica."""
    for body in (
        b'{"detail":"Not Found"}',
        b'{"error":{"message":"Not Found","type":"NotFoundError","code":404}}',
        b"",
    ):
        error = error_from_response(404, body)
        assert isinstance(error, RequestError)
        assert (error.status, error.code) == (404, "endpoint_not_supported")


@pytest.mark.parametrize("value, seconds", [(b"3", 3.0), (b"0.5", 0.5), (b"soon", None), (b"", None)])
def test_how_long_a_replica_wants_to_be_spared(value: bytes, seconds: float | None) -> None:
    """What it says in seconds is taken, anything else is nothing."""
    assert retry_after_seconds({b"retry-after": value}) == seconds
    assert retry_after_seconds({}) is None


@pytest.mark.parametrize(
    "body, finish",
    [
        (
            b'{"object":"response","status":"completed","output":[{"type":"function_call","name":"f"}]}',
            "tool_calls",
        ),
        (
            b'{"object":"response","status":"completed","output":[{"text":"a \\"type\\":\\"function_call\\""}]}',
            "completed",
        ),
        (
            b'{"object":"response","status":"incomplete","incomplete_details":{"reason":"content_filter"}}',
            "content_filter",
        ),
        (b'{"choices":[{"finish_reason":"stop"}]}', "stop"),
        (b'{"choices":[{"finish_reason": "length","stop_reason":null}]}', "length"),
        (b'{"type":"message","stop_reason":"end_turn"}', "end_turn"),
        (b'{"object":"response","status":"completed"}', "completed"),
        (b'{"choices":[{"message":{"content":"\\"finish_reason\\":\\"x\\""},"finish_reason":"stop"}]}', "stop"),
        (b"{}", ""),
    ],
)
def test_why_an_answer_ended(body: bytes, finish: str) -> None:
    """The reason is found in the words of each API, and never in what was said."""
    assert finish_reason(parse_response(body)) == finish


def test_an_answer_that_was_given_up_is_none() -> None:
    """The engine gave up in the middle, and says so in a field that nobody reads."""
    with pytest.raises(UpstreamError, match="aborted the generation"):
        finish_reason(parse_response(b'{"choices":[{"finish_reason":"abort"}]}'))


def test_a_replica_that_does_not_know_its_model() -> None:
    """A replica that answers to another name is broken, whatever the client sent."""
    error = error_from_response(404, VLLM_404)
    assert isinstance(error, UpstreamError)
    assert (error.code, "exist" in error.message) == ("upstream_misconfigured", False)


@pytest.mark.parametrize(
    "body, kind, code",
    [
        (b'{"error":{"message":"secret"}}', UpstreamError, "upstream_error"),
        (b'{"id":"x","error":{"message":"secret","code":500},"choices":[]}', UpstreamError, "upstream_error"),
        (b'{"error":"secret"}', UpstreamError, "upstream_error"),
        (b'{"error":{"message":"too long","code":400}}', RequestError, "invalid_request"),
        (b'{"error":{"message":"busy","code":503}}', ReplicaFull, "overloaded"),
    ],
)
def test_an_error_under_a_200(body: bytes, kind: type[Exception], code: str) -> None:
    """It means what it would mean under the status that it tells, and is a failure without one."""
    with pytest.raises(kind) as caught:
        parse_response(body)
    assert (getattr(caught.value, "code", None), "secret" in str(caught.value)) == (code, False)


def test_null_is_no_error() -> None:
    """/v1/responses has the key in every answer."""
    assert set(parse_response(b'{"error": null,"output":[]}')) == {"error", "output"}


@pytest.mark.parametrize(
    "body",
    [
        b'{"object":"response","status":"completed","metadata":{"finish_reason":"abort","status":"failed"}}',
        b'{"object":"response","tools":[{"finish_reason":"abort"}],"status":"completed"}',
    ],
)
def test_what_a_client_made_up_ends_nothing(body: bytes) -> None:
    """Responses repeat the request: words in it must not count as the engine's, or a client could fail replicas."""
    assert finish_reason(parse_response(body)) == "completed"


def test_any_choice_that_was_given_up_counts() -> None:
    """Of several choices it needn't be the last; and a response says it in its own word."""
    with pytest.raises(UpstreamError, match="aborted the generation"):
        finish_reason(parse_response(b'{"choices":[{"finish_reason":"abort"},{"finish_reason":"stop"}]}'))
    with pytest.raises(UpstreamError, match="failed"):
        finish_reason(parse_response(b'{"object":"response","status":"failed"}'))


@pytest.mark.parametrize("value", [b"nan", b"inf", b"-1", b"0"])
def test_no_time_is_none(value: bytes) -> None:
    """A number that can't be waited for is nothing."""
    assert retry_after_seconds({b"retry-after": value}) is None
