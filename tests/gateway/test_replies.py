"""What a replica's bytes become: the asked model's name, our error shape, and nothing else."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import RequestError, Unavailable, UpstreamError
from gateway.relay.accounting import CompletionDetails, Usage
from gateway.relay.replies import Transcript, carries_token, refusal, renamed

WHOLE = (
    '{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m1","choices":[{"message":{"content":'
    '"\\"model\\":\\"m1\\" café \\u00e9"},"logprobs":{"x":[-0.0,1E5,123456789012345678901]}}],'
    '"usage":{"prompt_tokens":61,"total_tokens":77,"completion_tokens":16,'
    '"completion_tokens_details":{"reasoning_tokens":2},"prompt_tokens_details":null},"kv_transfer_params":null}'
)


def event(text: str) -> bytes:
    """An event as vLLM writes it."""
    return f"data: {text}\n\n".encode()


def chunk(content: str, model: str = "m1") -> bytes:
    """A chunk of a chat stream, as compact as vLLM's."""
    said = {"index": 0, "delta": {"content": content}, "finish_reason": None}
    return event(json.dumps({"id": "c", "model": model, "choices": [said]}, separators=(",", ":"), ensure_ascii=False))


USAGE = '"usage":{"prompt_tokens":3,"total_tokens":7,"completion_tokens":4}'
ONLY_USAGE = event('{"id":"c","model":"m1","choices":[],' + USAGE + "}")
DONE = event("[DONE]")


@pytest.mark.parametrize("model", ["smol", "team/small", 'q"\\uote', "汉字", "a\\1"])
def test_only_the_name_changes_in_a_whole_answer(model: str) -> None:
    """The asked name comes back; all other bytes of a compact answer stay, and usage is read."""
    body, usage = renamed(WHOLE.encode(), model)
    name = msgspec.json.encode(model).decode()
    assert body.decode() == WHOLE.replace('"model":"m1"', f'"model":{name}', 1)
    assert json.loads(body)["model"] == model
    assert usage == Usage(61, 16, CompletionDetails(2))


def test_usage_may_be_missing() -> None:
    """An answer without usage, or with null for it, is passed on."""
    assert renamed(b'{"model":"m1"}', "smol") == (b'{"model":"smol"}', None)
    assert renamed(b'{"model":"m1","usage":null}', "smol") == (b'{"model":"smol","usage":null}', None)
    assert renamed(b'{"model":"m1","usage":{"prompt_tokens":null}}', "m")[1] == Usage(None, 0)


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b'{"model"', b'{"\xff":1}', b'{"a":' + b"[" * 100_000])
def test_an_answer_that_is_no_object_is_a_failure(body: bytes) -> None:
    """Another replica may be asked when the answer makes no sense."""
    with pytest.raises(UpstreamError) as caught:
        renamed(body, "smol")
    assert (caught.value.status, caught.value.code) == (502, "upstream_invalid")


@pytest.mark.parametrize(
    "given_event, passed",
    [
        (chunk("a"), chunk("a", "smol")),
        (chunk("a", "a name of its own"), chunk("a", "smol")),
        (chunk('"model":"m1"'), chunk('"model":"m1"', "smol")),
        (chunk("é汉\\"), chunk("é汉\\", "smol")),
        (event('{"id": "c", "model": "m1", "choices": []}'), event('{"id": "c", "model": "smol", "choices": []}')),
        (event('{"id":"c","choices":[]}'), event('{"id":"c","choices":[]}')),
        (event('{"id":"c","usage":null,"choices":[]}'), event('{"id":"c","usage":null,"choices":[]}')),
        (event('{"error":null,"model":"m1"}'), event('{"error":null,"model":"smol"}')),
        (b": keep-alive\n\n", b": keep-alive\n\n"),
        (b":\n: two\n\n", b":\n: two\n\n"),
        (b"event: ping\n\n", b""),
        (b"id: 7\n\n", b""),
        (b": hi\nevent: ping\n\n", b""),
        (b'id: 7\ndata: {"model":"m1"}\n\n', b'id: 7\ndata: {"model":"smol"}\n\n'),
        (b': hi\ndata: {"model":"m1"}\n\n', b': hi\ndata: {"model":"smol"}\n\n'),
        (b'\ndata: {"model":"m1"}\n\n', b'\ndata: {"model":"smol"}\n\n'),
        (event("not json"), event("not json")),
        (event('{"usage":{"prompt_tokens":'), event('{"usage":{"prompt_tokens":')),
        (
            event('{"usage":{"prompt_tokens":"many"},"choices":[]}'),
            event('{"usage":{"prompt_tokens":"many"},"choices":[]}'),
        ),
    ],
)
def test_what_passes_of_a_stream(given_event: bytes, passed: bytes) -> None:
    """The asked name comes back in every chunk, other bytes stay; an event without data, which crashes SDKs, goes."""
    transcript = Transcript("smol", wants_usage=False)
    assert transcript.passed_on(given_event) == passed
    assert (transcript.finished, transcript.failure) == (False, None)


@given(st.text(), st.text(min_size=1), st.text(min_size=1))
def test_any_text_passes(text: str, served: str, asked: str) -> None:
    """Whatever is said, and whatever names are in force, only the name changes."""
    assert Transcript(asked, wants_usage=True).passed_on(chunk(text, served)) == chunk(text, asked).replace(
        json.dumps(asked, ensure_ascii=False).encode(), msgspec.json.encode(asked), 1
    )


@pytest.mark.parametrize("wanted", [True, False])
def test_usage_is_metered_and_shown_only_if_asked_for(wanted: bool) -> None:
    """The last chunk's tokens are counted either way."""
    transcript = Transcript("smol", wants_usage=wanted)
    assert transcript.passed_on(ONLY_USAGE) == (ONLY_USAGE.replace(b"m1", b"smol") if wanted else b"")
    assert transcript.usage == Usage(3, 4)


def test_continuous_usage_passes() -> None:
    """Usage beside choices belongs to the answer: it is counted and stays."""
    transcript = Transcript("smol", wants_usage=False)
    running = event('{"model":"m1","choices":[{"index":0}],' + USAGE + "}")
    assert transcript.passed_on(running) == running.replace(b"m1", b"smol")
    assert transcript.usage == Usage(3, 4)


@pytest.mark.parametrize("done", [DONE, b"data:[DONE]\n\n", b"event: end\ndata: [DONE]\n\n"])
def test_the_end_of_a_stream(done: bytes) -> None:
    """The end is known however it is spaced."""
    transcript = Transcript("smol", wants_usage=False)
    assert transcript.passed_on(done) == done
    assert transcript.finished


@pytest.mark.parametrize(
    "error, message, kind, code, status",
    [
        (
            '{"message":"EngineCore died, see /var/log","type":"InternalServerError","param":null,"code":500}',
            *("a replica failed with status 500", "upstream_error", "upstream_error", 502),
        ),
        ('{"message":"secret"}', "a replica failed with status 502", "upstream_error", "upstream_error", 502),
        ('"secret"', "a replica failed with status 502", "upstream_error", "upstream_error", 502),
        (
            '{"message":"too long","type":"BadRequestError","param":"messages","code":400}',
            *("too long", "BadRequestError", "400", 400),
        ),
    ],
)
def test_errors_in_a_stream(error: str, message: str, kind: str, code: str, status: int) -> None:
    """An error event is told in OpenAI's shape with a string code; what a failing engine says stays inside."""
    for written in (event('{"error":' + error + "}"), b"event: error\n" + event('{ "error" : ' + error + "}")):
        transcript = Transcript("smol", wants_usage=False)
        told = json.loads(transcript.passed_on(written).removeprefix(b"data: "))["error"]
        assert (told["message"], told["type"], told["code"], told["param"]) == (message, kind, code, None)
        assert transcript.failure is not None
        assert transcript.failure.status == status


def test_a_broken_error_in_a_stream_is_an_error() -> None:
    """An error event that is no JSON is a failure, too."""
    transcript = Transcript("smol", wants_usage=False)
    assert b"a replica failed" in transcript.passed_on(event('{"error": oops'))
    assert transcript.failure is not None


@pytest.mark.parametrize(
    "passed, carries",
    [
        (chunk("a"), True),
        (event('{"choices":[{"delta":{"role":"assistant","content":""}}]}'), False),
        (DONE, False),
        (b": keep-alive\n\n", False),
        (b"", False),
    ],
)
def test_what_counts_as_a_token(passed: bytes, carries: bool) -> None:
    """The opening of a chat, comments and the end carry nothing."""
    assert carries_token(passed) is carries


VLLM_404 = b'{"error":{"message":"The model `m` does not exist.","type":"NotFoundError","param":"model","code":404}}'
TOO_LONG = b'{"error":{"message":"too long","type":"BadRequestError","param":"input_tokens","code":400}}'


@pytest.mark.parametrize(
    "status, body, shown",
    [
        (400, TOO_LONG, ("too long", "BadRequestError", "input_tokens", "400")),
        (400, TOO_LONG.replace(b"400", b'"too_long"'), ("too long", "BadRequestError", "input_tokens", "too_long")),
        (400, TOO_LONG.replace(b"400", b"null"), ("too long", "BadRequestError", "input_tokens", "invalid_request")),
        (422, b'{"detail":"no field"}', ("no field", "invalid_request_error", None, "invalid_request")),
        (422, b'{"detail":[{"msg":"x"}]}', ("[{'msg': 'x'}]", "invalid_request_error", None, "invalid_request")),
        (400, b'{"error":"plain"}', ("plain", "invalid_request_error", None, "invalid_request")),
        (
            405,
            b"<html>",
            ("the engine refused the request with status 405", *("invalid_request_error", None), "invalid_request"),
        ),
        (
            413,
            b"",
            ("the engine refused the request with status 413", *("invalid_request_error", None), "invalid_request"),
        ),
        (
            429,
            b"\xff",
            ("the engine refused the request with status 429", *("invalid_request_error", None), "invalid_request"),
        ),
        (
            400,
            b'{"error":{}}',
            ("the engine refused the request with status 400", *("invalid_request_error", None), "invalid_request"),
        ),
    ],
)
def test_a_clients_mistake_is_passed_on(status: int, body: bytes, shown: tuple[str, str, str | None, str]) -> None:
    """A 4xx keeps its status and its words, in OpenAI's shape with a string code, and is not asked for again."""
    error = refusal(status, body)
    assert isinstance(error, RequestError)
    assert error.status == status
    assert (error.message, error.type, error.param, error.code) == shown


@pytest.mark.parametrize("status", [201, 204, 301, 307, 401, 403, 404, 500, 501, 502, 504, 599])
@pytest.mark.parametrize("body", [b'{"error":"Unauthorized"}', VLLM_404, b"secret", b""])
def test_a_failing_replica_tells_nothing(status: int, body: bytes) -> None:
    """What is not the client's mistake is a failure of ours: another replica may be asked, no text gets out."""
    error = refusal(status, body)
    assert isinstance(error, UpstreamError)
    assert error.status == 502
    assert str(status) in error.message
    assert not {"Unauthorized", "exist", "secret"} & set(error.body().decode().split())


def test_a_busy_replica() -> None:
    """503 means: another one may have room, or the client should come back."""
    error = refusal(503, b'{"error":{"message":"The engine is busy"}}')
    assert isinstance(error, Unavailable)
    assert (error.status, error.code, error.headers()) == (503, "overloaded", [(b"retry-after", b"5")])
