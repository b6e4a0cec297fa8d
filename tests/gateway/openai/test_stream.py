"""What passes of a stream, event by event, and how its end is known."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import UpstreamDisconnected, UpstreamError
from gateway.openai.endpoints import CHAT, MESSAGES, RESPONSES, Endpoint
from gateway.openai.named_events import NamedEventFilter
from gateway.openai.sse import EventSplitter, event_data
from gateway.openai.stream import ChunkFilter, stream_filter
from gateway.openai.usage import Usage


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
LAST = event('{"id":"c","model":"m1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}')


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
    transcript = ChunkFilter(CHAT, "smol", wants_usage=False)
    assert transcript.apply(given_event) == passed
    assert (transcript.finished, transcript.failure) == (False, None)


@given(st.text(), st.text(min_size=1), st.text(min_size=1))
def test_any_text_passes(text: str, served: str, asked: str) -> None:
    """Whatever is said, and whatever names are in force, only the name changes."""
    assert ChunkFilter(CHAT, asked, wants_usage=True).apply(chunk(text, served)) == chunk(text, asked).replace(
        json.dumps(asked, ensure_ascii=False).encode(), msgspec.json.encode(asked), 1
    )


@pytest.mark.parametrize("wanted", [True, False])
def test_usage_is_metered_and_shown_only_if_asked_for(wanted: bool) -> None:
    """The last chunk's tokens are counted either way."""
    transcript = ChunkFilter(CHAT, "smol", wants_usage=wanted)
    assert transcript.apply(ONLY_USAGE) == (ONLY_USAGE.replace(b"m1", b"smol") if wanted else b"")
    assert transcript.usage == Usage(3, 4)


ENVELOPE = '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1795661717,"model":"m1","choices":'
END_OF_CHOICE = (
    ENVELOPE + '[{"index":%d,"delta":{"content":" colour"},"logprobs":null,"finish_reason":"length",'
    '"stop_reason":null,"token_ids":null}]%s}'
)
FINGERPRINT = ',"system_fingerprint":"smol-bf16"'
LAST_USAGE = (
    ENVELOPE + '[],"usage":{"prompt_tokens":34,"total_tokens":42,"completion_tokens":8,'
    '"prompt_tokens_details":{"cached_tokens":32}}' + FINGERPRINT + "}"
)


@pytest.mark.parametrize("choices", [1, 2])
def test_the_fingerprint_stays(choices: int) -> None:
    """vLLM's own bytes: where nobody asks for usage, the fingerprint stands in the chunks that end a choice."""
    transcript = ChunkFilter(CHAT, "m1", wants_usage=False)
    asked_for_usage = [event(END_OF_CHOICE % (index, "")) for index in range(choices)] + [event(LAST_USAGE), DONE]
    without_usage = [event(END_OF_CHOICE % (index, FINGERPRINT)) for index in range(choices)] + [DONE]
    assert b"".join(map(transcript.apply, asked_for_usage)) == b"".join(without_usage)
    assert transcript.usage == Usage(34, 8)


@pytest.mark.parametrize("kept", [b'"system_fingerprint":null', b'"system_fingerprint":"fp"', b'"x":1'])
def test_a_fingerprint_of_their_own(kept: bytes) -> None:
    """Engines that write it everywhere, or nowhere, have all chunks passed on as they are."""
    transcript = ChunkFilter(CHAT, "m1", wants_usage=False)
    last = LAST.replace(b'"id":"c"', b'"id":"c",' + kept)
    usage = ONLY_USAGE.replace(b'"id":"c"', b'"id":"c",' + kept)
    assert transcript.apply(last) + transcript.apply(usage) == last


def test_a_choice_that_ends_before_others() -> None:
    """It is held up by nobody: what comes behind it lets it go."""
    transcript = ChunkFilter(CHAT, "m1", wants_usage=False)
    assert transcript.apply(LAST) == b""
    assert transcript.apply(chunk("a")) == LAST + chunk("a")
    assert transcript.apply(LAST) + transcript.apply(ONLY_USAGE) == LAST


def test_usage_that_was_asked_for_holds_nothing_up() -> None:
    """Who asked for usage gets every chunk as it comes."""
    assert ChunkFilter(CHAT, "m1", wants_usage=True).apply(LAST) == LAST


def test_continuous_usage_passes() -> None:
    """Usage beside choices belongs to the answer: it is counted and stays."""
    transcript = ChunkFilter(CHAT, "smol", wants_usage=False)
    running = event('{"model":"m1","choices":[{"index":0}],' + USAGE + "}")
    assert transcript.apply(running) == running.replace(b"m1", b"smol")
    assert transcript.usage == Usage(3, 4)


@pytest.mark.parametrize("done", [DONE, b"data:[DONE]\n\n", b"event: end\ndata: [DONE]\n\n"])
def test_the_end_of_a_stream(done: bytes) -> None:
    """The end is known however it is spaced; what ended a choice goes out with it at the latest."""
    transcript = ChunkFilter(CHAT, "smol", wants_usage=False)
    assert transcript.apply(LAST) == b""
    assert transcript.apply(done) == LAST.replace(b"m1", b"smol") + done
    assert (transcript.finished, transcript.finish, transcript.failure) == (True, "stop", None)


def test_an_end_without_a_reason_is_none() -> None:
    """`[DONE]` behind half an answer is told as the failure that it is."""
    transcript = ChunkFilter(CHAT, "smol", wants_usage=False)
    transcript.apply(chunk("a"))
    told = json.loads(event_data(transcript.apply(DONE)))["error"]
    assert (told["code"], transcript.finished) == ("upstream_disconnected", False)
    assert isinstance(transcript.failure, UpstreamDisconnected)


def test_an_error_by_its_name() -> None:
    """An event that is called an error is one, whatever is in it; what is in it stays inside."""
    transcript = ChunkFilter(CHAT, "smol", wants_usage=False)
    told = transcript.apply(b'event: error\ndata: {"message":"secret"}\n\n')
    assert (transcript.failure is None, b"secret" in told) == (False, False)


def test_an_answer_that_the_engine_gave_up() -> None:
    """`abort` looks like an end and is none."""
    transcript = ChunkFilter(CHAT, "smol", wants_usage=False)
    told = json.loads(event_data(transcript.apply(LAST.replace(b"stop", b"abort"))))["error"]
    assert told["code"] == "upstream_aborted"
    assert transcript.failure is not None


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
            *("too long", "BadRequestError", "invalid_request", 400),
        ),
    ],
)
def test_errors_in_a_stream(error: str, message: str, kind: str, code: str, status: int) -> None:
    """An error event is told in OpenAI's shape with a string code; what a failing engine says stays inside."""
    for written in (event('{"error":' + error + "}"), b"event: error\n" + event('{ "error" : ' + error + "}")):
        transcript = ChunkFilter(CHAT, "smol", wants_usage=False)
        told = json.loads(transcript.apply(written).removeprefix(b"data: "))["error"]
        assert (told["message"], told["type"], told["code"]) == (message, kind, code)
        assert transcript.failure is not None
        assert transcript.failure.status == status


def test_a_broken_error_in_a_stream_is_an_error() -> None:
    """An error event that is no JSON is a failure, too."""
    transcript = ChunkFilter(CHAT, "smol", wants_usage=False)
    assert b"a replica failed" in transcript.apply(event('{"error": oops'))
    assert transcript.failure is not None


@pytest.mark.parametrize(
    "passed, carries",
    [
        (chunk("a"), True),
        (event('{"choices":[{"delta":{"role":"assistant","content":""}}]}'), False),
        (ONLY_USAGE, False),
        (b": keep-alive\n\n", False),
    ],
)
def test_what_counts_as_a_token(passed: bytes, carries: bool) -> None:
    """The opening of a chat, comments, usage and the end carry nothing."""
    transcript = ChunkFilter(CHAT, "smol", wants_usage=False)
    transcript.apply(passed)
    assert transcript.tokens is carries


def named(name: str, text: str) -> bytes:
    """A named event as vLLM writes it."""
    return f"event: {name}\ndata: {text}\n\n".encode()


RESPONSE = (
    named("response.created", '{"response":{"id":"r","model":"m1","output":[]},"type":"response.created"}'),
    named("response.output_text.delta", '{"delta":"a \\"model\\":\\"m1\\"","type":"response.output_text.delta"}'),
    named(
        "response.completed",
        '{"response":{"id":"r","model":"m1","usage":{"input_tokens":3,"output_tokens":4,'
        '"output_tokens_details":{"reasoning_tokens":1},"total_tokens":7}},"type":"response.completed"}',
    ),
)
MESSAGE = (
    named(
        "message_start",
        '{"type":"message_start","message":{"id":"x","content":[],"model":"m1","usage":{"input_tokens":3,"output_tokens":0}}}',
    ),
    named("content_block_start", '{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}'),
    named("content_block_delta", '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"a"}}'),
    named("content_block_stop", '{"type":"content_block_stop","index":0}'),
    named("message_delta", '{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":4}}'),
    named("message_stop", '{"type":"message_stop"}'),
)


@pytest.mark.parametrize(
    "endpoint, told, finish, reasoning", [(RESPONSES, RESPONSE, "stop", 1), (MESSAGES, MESSAGE, "end_turn", 0)]
)
def test_named_events(endpoint: Endpoint, told: tuple[bytes, ...], finish: str, reasoning: int) -> None:
    """Only the name changes, only where it is the model's; tokens, usage and the end are known."""
    transcript = NamedEventFilter(endpoint, "smol")
    tokens = []
    for each in told:
        assert transcript.apply(each) == each.replace(b'"model":"m1"', b'"model":"smol"')
        tokens.append(transcript.tokens)
    assert sum(tokens) == 1
    assert (transcript.finished, transcript.finish, transcript.failure) == (True, finish, None)
    assert transcript.usage is not None
    assert (transcript.usage.prompt, transcript.usage.completion, transcript.usage.reasoning) == (3, 4, reasoning)


@pytest.mark.parametrize(
    "endpoint, written",
    [
        (RESPONSES, named("error", '{"type":"error","message":"secret","code":"x","param":null}')),
        (MESSAGES, named("error", '{"type":"error","error":{"type":"internal_error","message":"secret"}}')),
        (RESPONSES, event('{"error":{"message":"secret","type":"InternalServerError","code":500}}')),
    ],
)
def test_errors_among_named_events(endpoint: Endpoint, written: bytes) -> None:
    """An error is told so that the SDK of each grammar raises; what a failing engine says stays inside."""
    transcript = NamedEventFilter(endpoint, "smol")
    passed = transcript.apply(written)
    told = json.loads(event_data(passed))
    assert passed.startswith(b"event: error\n")
    assert told["type"] == "error"
    assert "secret" not in told["error"]["message"]
    assert transcript.failure is not None


def test_a_response_that_failed() -> None:
    """The engine says itself that it failed."""
    transcript = NamedEventFilter(RESPONSES, "smol")
    transcript.apply(named("response.failed", '{"response":{"model":"m1"},"type":"response.failed"}'))
    assert isinstance(transcript.failure, UpstreamError)


@given(st.sampled_from([CHAT, RESPONSES, MESSAGES]), st.binary(max_size=200))
def test_no_garbage_ends_in_a_defect(endpoint: Endpoint, data: bytes) -> None:
    """Whatever a replica sends, it is passed on, left out, or a failure."""
    transcript = stream_filter(endpoint, "smol", wants_usage=False)
    for each in EventSplitter().feed(b"data: {" + data + b"\n\nevent: message_delta\ndata: {" + data + b"\n\n"):
        assert isinstance(transcript.apply(each), bytes)


@pytest.mark.parametrize(
    "written",
    [
        b'event: error\ndata: {"message":"secret"}\n\n',
        b"event: error\ndata: secret\n\n",
        b'event: error\ndata: "secret"\n\n',
        event('{"id":"x","error":{"message":"secret"},"choices":[]}'),
    ],
)
@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, MESSAGES])
def test_an_error_however_it_is_written(endpoint: Endpoint, written: bytes) -> None:
    """An event that is called an error is one, whatever it says; so is a chunk with an error behind other keys."""
    transcript = stream_filter(endpoint, "smol", wants_usage=False)
    assert b"secret" not in transcript.apply(written)
    assert isinstance(transcript.failure, UpstreamError)


def test_a_word_is_no_error() -> None:
    """A token may be the very word, and a key may have nothing in it."""
    for data in ('{"choices":[{"delta":{"content":"error"}}]}', '{"error":null,"choices":[{"delta":{"content":"a"}}]}'):
        transcript = ChunkFilter(CHAT, "smol", wants_usage=False)
        assert transcript.apply(event(data)) == event(data)
        assert transcript.failure is None


def test_an_end_with_blanks() -> None:
    """Other engines write JSON with blanks."""
    transcript = ChunkFilter(CHAT, "smol", wants_usage=False)
    transcript.apply(event('{"choices": [{"delta": {}, "finish_reason": "stop"}]}'))
    transcript.apply(event("[DONE]"))
    assert (transcript.finished, transcript.finish) == (True, "stop")


def test_one_of_several_that_was_given_up() -> None:
    """A chunk may end several choices at once."""
    transcript = ChunkFilter(CHAT, "smol", wants_usage=False)
    transcript.apply(event('{"choices":[{"finish_reason":"abort"},{"finish_reason":"stop"}]}'))
    assert transcript.failure is not None


@pytest.mark.parametrize(
    "endpoint, end",
    [(CHAT, (LAST, event("[DONE]"))), (RESPONSES, RESPONSE), (MESSAGES, MESSAGE)],
    ids=lambda value: value.name if isinstance(value, Endpoint) else "",
)
def test_behind_the_end_is_nothing(endpoint: Endpoint, end: tuple[bytes, ...]) -> None:
    """What a replica says after all has been told is neither passed on nor a failure."""
    transcript = stream_filter(endpoint, "smol", wants_usage=False)
    for each in end:
        transcript.apply(each)
    assert transcript.finished
    for late in (chunk("a"), event('{"error":{"message":"x"}}'), named("error", "{}")):
        assert transcript.apply(late) == b""
    assert (transcript.failure, transcript.tokens) == (None, False)


def finish(index: int) -> bytes:
    """The end of one choice."""
    choice = {"index": index, "delta": {}, "finish_reason": "stop"}
    return event(json.dumps({"id": "c", "model": "m1", "choices": [choice]}, separators=(",", ":")))


@pytest.mark.parametrize(
    "ends, whole", [((0, 1), True), ((1, 0), True), ((0,), False), ((0, 0), False), ((), False), ((1,), False)]
)
def test_every_choice_ends(ends: tuple[int, ...], whole: bool) -> None:
    """As many different choices end as were asked for, or the stream has failed."""
    transcript = ChunkFilter(CHAT, "smol", wants_usage=False, choices=2)
    for index in ends:
        transcript.apply(finish(index))
    transcript.apply(DONE)
    assert (transcript.finished, transcript.failure is None) == (whole, whole)


@pytest.mark.parametrize(
    "delta, flowing",
    [
        ({"role": "assistant", "content": ""}, False),
        ({"role": "assistant", "content": None, "reasoning": None, "tool_calls": []}, False),
        ({"role": "assistant"}, False),
        ({}, False),
        ({"role": "assistant", "content": "a"}, True),
        ({"reasoning": "a"}, True),
        ({"reasoning_content": " "}, True),
        ({"tool_calls": [{"index": 0}]}, True),
        ({"refusal": "no"}, True),
    ],
)
def test_what_is_content(delta: dict[str, object], flowing: bool) -> None:
    """Whatever a delta has besides its role."""
    transcript = ChunkFilter(CHAT, "smol", wants_usage=False)
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    transcript.apply(event(json.dumps({"model": "m1", "choices": [choice]})))
    assert (transcript.flowing, transcript.tokens) == (flowing, flowing)
