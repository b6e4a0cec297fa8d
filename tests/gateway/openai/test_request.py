"""Reading a request: what is decided on is read, everything else keeps its bytes."""

import json
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from config.schema import Floor
from gateway.errors import RequestError
from gateway.openai.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, ENDPOINTS, MESSAGES, RESPONSES, Endpoint
from gateway.openai.fields import FLAG, INTEGER
from gateway.openai.limits import GUARDED_FIELDS, GUARDED_KWARGS
from gateway.openai.request import MAX_KEYS, MAX_MODEL_CHARACTERS
from tests.gateway.openai.parsing import names, parse

RAW = msgspec.json.Decoder(dict[str, msgspec.Raw])

# Values whose bytes a parse and a dump would change.
DELICATE = [
    *("1.0", "1E5", "-0", "-0.0", "1e400", "123456789012345678901234567890", "0.1000", "3.0000000000000004"),
    *('"caf\\u00e9"', '"café 汉字"', '"\\ud83d\\ude00"', '"\\/"', '""', "null", "true"),
    *('{"b": 1, "a": 2, "b": 3}', "[1 ,2,\t3]", '{"z":{"y":[]}}'),
]


def sent(body: str, endpoint: Endpoint = CHAT, *may: str, max_tokens: int | None = None) -> dict[str, Any]:
    """What a replica gets for a body."""
    read: dict[str, Any] = json.loads(parse(body, endpoint, frozenset(may), max_tokens).body_for("m1"))
    return read


values = st.sampled_from(DELICATE) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
).map(json.dumps)


@given(st.dictionaries(names, values, max_size=6), st.booleans())
def test_unknown_fields_keep_their_bytes(fields: dict[str, str], stream: bool) -> None:
    """Whatever a client sends beside what we read reaches the replica with the same bytes, in the same order."""
    known = {"model": '"smol"', "stream": json.dumps(stream), "provider": '{"quantizations": ["int4"]}'}
    body = " , ".join(f'"{name}" : {value}' for name, value in {**fields, **known}.items())
    passed = {name: bytes(raw).decode() for name, raw in RAW.decode(parse(f"{{ {body} }}").body_for("m1")).items()}
    asked_usage = {"stream_options": '{"include_usage":true}'} if stream else {}
    assert list(passed.items()) == list(
        {**fields, "model": '"m1"', "stream": json.dumps(stream), **asked_usage}.items()
    )


# Keys that are read, with values that are nearly right.
known_keys = st.sampled_from(
    [
        *("model", "stream", "stream_options", "provider", "n", "stop", "stop_sequences", "logprobs", "top_logprobs"),
        *("messages", "input", "prompt", "tools", "chat_template_kwargs", "max_tokens", "background", "store"),
        *("best_of", "prompt_logprobs", "previous_response_id", "return_token_ids", "mod\\u0065l", "chat_template"),
    ]
)
pieces = st.sampled_from(
    [
        *('"a"', "null", "true", "1", "-1", "1e9", "1" * 5000, "[]", "{}", '["a"]', "[1]", '"\\ud800"', "NaN", "'"),
        *('{"include_usage":true}', '{"quantizations":["int8"]}', '{"chat_template":"x","a":[1]}', "[" * 70 + "]" * 70),
        *(
            '{"include_usage":1,"include_usage":2}',
            '{"tokenize":1,"tokeni\\u007ae":2}',
            "[" * 990 + "]" * 990,
            '"\xff"',
        ),
    ]
)
bodies = st.lists(st.tuples(known_keys, pieces | values), max_size=6).map(
    lambda pairs: ("{" + ",".join(f'"{key}":{value}' for key, value in [("model", '"m"'), *pairs]) + "}").encode(
        "latin-1", "replace"
    )
)
any_endpoint = st.sampled_from(list(ENDPOINTS.values()))


@given(st.binary(max_size=64) | values.map(str.encode) | bodies, any_endpoint, st.none() | st.integers(0, 9))
def test_any_bytes_are_a_request_or_a_refusal(body: bytes, endpoint: Endpoint, max_tokens: int | None) -> None:
    """No body makes the gateway itself fail, neither in reading it nor in writing what a replica gets."""
    with suppress(RequestError):
        inference = parse(body, endpoint, max_tokens=max_tokens)
        assert inference.model
        assert json.loads(inference.without_thinking().body_for("m1", token_ids=True), parse_int=str)


@given(bodies, any_endpoint)
def test_an_accepted_body_reaches_the_replica_as_it_is(body: bytes, endpoint: Endpoint) -> None:
    """Apart from the keys that the gateway is known to change, a replica reads what the client wrote."""
    try:
        inference = parse(body, endpoint)
    except RequestError:
        return
    ours = {"model", "provider", *GUARDED_FIELDS}
    ours |= {"stream_options"} if inference.stream and not inference.wants_usage else set()
    ours |= {"store"} if endpoint is RESPONSES else set()
    before, after = (json.loads(each, parse_int=str) for each in (body, inference.body_for("m1")))
    if kwargs := before.get("chat_template_kwargs"):
        before["chat_template_kwargs"] = {key: value for key, value in kwargs.items() if key not in GUARDED_KWARGS}
    assert after.keys() & (GUARDED_FIELDS | {"provider"}) == set()
    assert after["model"] == "m1"
    assert [pair for pair in before.items() if pair[0] not in ours] == [
        pair for pair in after.items() if pair[0] not in ours
    ]


DEEP = 100_000


@pytest.mark.parametrize(
    "body, param, code, words",
    [
        ("", None, "invalid_json", "the body is empty; send a JSON object"),
        (" \n", None, "invalid_json", "the body is empty"),
        (b"\xef\xbb\xbf{}", None, "invalid_json", "a byte order mark; send plain UTF-8"),
        ('{"model": "a"}'.encode("utf-16"), None, "invalid_json", "a byte order mark; send plain UTF-8"),
        (b'{"model": "a", "x": "\xff"}', None, "invalid_json", "can't decode"),
        (b'{"model": "a", "x": "\xed\xa0\x80"}', None, "invalid_json", "can't decode"),
        ('{"model": "a", "x": Infinity}', None, "invalid_json", "malformed"),
        ('{"model": "a", "x": ' + "[" * 64 + "]" * 64 + "}", None, "invalid_json", "deeper than 64 levels"),
        ('{"model": "a", "x": 1, "n": 1, "x": 1}', "x", "duplicate_key", "duplicate key 'x'; send it once"),
        ('{"model":"a","mod\\u0065l":"b"}', "model", "duplicate_key", "duplicate key 'model'"),
        ('{"model":"a","stream_options":{"x":1,"x":2}}', "stream_options.x", "duplicate_key", "duplicate key"),
        ('{"model":"a","provider":{"x":1,"x":2}}', "provider.x", "duplicate_key", "duplicate key"),
        (
            '{"model":"a","chat_template_kwargs":{"x":1,"x":2}}',
            "chat_template_kwargs.x",
            "duplicate_key",
            "duplicate key",
        ),
        (
            json.dumps(dict.fromkeys(map(str, range(MAX_KEYS + 1)))),
            *(None, "invalid_request", "the body has 257 keys, the limit is 256"),
        ),
        ('{"model": "a\\n"}', "model", "invalid_request", "'model' is not a valid model name: 'a\\n'"),
        (
            json.dumps({"model": "a" * (MAX_MODEL_CHARACTERS + 1)}),
            "model",
            "invalid_request",
            "'model' is not a valid model name",
        ),
        ("[]", None, "invalid_json", "the body is not a JSON object"),
        ('{"model": "a"', None, "invalid_json", "not a JSON object"),
        ('{"model": "a"} x', None, "invalid_json", "trailing"),
        ('{"model": "a", "x": NaN}', None, "invalid_json", "malformed"),
        (b'{"model\xff": "a"}', None, "invalid_json", "can't decode"),
        ('{"model": "a", "x": ' + "[" * DEEP + "]" * DEEP + "}", None, "invalid_json", "recursion"),
        ("{}", "model", "invalid_request", "'model' is missing; GET /v1/models lists the names"),
        ('{"model": ""}', "model", "invalid_request", "'model' is missing"),
        ('{"model": null}', "model", "invalid_request", "Expected `str`"),
        ('{"model": 7}', "model", "invalid_request", "'model': Expected `str`, got `int`"),
        (b'{"model": "\xff"}', None, "invalid_json", "can't decode"),
        (
            '{"model": "a", "stream_options": {"include_usage": "maybe"}}',
            *("stream_options.include_usage", "invalid_request", "'stream_options.include_usage': Expected `bool"),
        ),
        (
            json.dumps({"model": "a", "provider": {"quantizations": ["int8"] * 1000}}),
            *("provider.quantizations", "invalid_request", "is longer than 4096 bytes"),
        ),
        ('{"model": "a", "n": 5}', "n", "invalid_request", "'n' is 5, the limit is 4"),
        ('{"model": "a", "n": "four"}', "n", "invalid_request", "'n': Expected `int | null`, got `str`"),
        ('{"model": "a", "n": 1' + "0" * 30 + "}", "n", "invalid_request", "the limit is 4"),
        ('{"model": "a", "x": "\\ud800"}', None, "invalid_json", "not a JSON object"),
        ('{"model": "a", "stream": "maybe"}', "stream", "invalid_request", "Expected `bool | null`"),
        ('{"model": "a", "stream_options": 1}', "stream_options", "invalid_request", "Expected `object | null`"),
        ('{"model": "a", "provider": []}', "provider", "invalid_request", "Expected `object | null`"),
        (
            '{"model": "a", "provider": {"quantizations": "int8"}}',
            *("provider.quantizations", "invalid_request", "must be a list of names such as int8"),
        ),
        (
            '{"model": "a", "provider": {"quantizations": [8]}}',
            *("provider.quantizations", "invalid_request", "must be a list of names"),
        ),
    ],
)
def test_what_is_refused(body: str | bytes, param: str | None, code: str, words: str) -> None:
    """A body that can't be read is refused with the key at fault."""
    with pytest.raises(RequestError) as caught:
        parse(body)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert words in caught.value.message


def test_what_is_read() -> None:
    """Model, stream and the wish for usage are read; null is as good as absent."""
    inference = parse('{"model":"a","stream":true,"stream_options":{"include_usage":true},"n":4}')
    assert (inference.endpoint, inference.model) == (CHAT, "a")
    assert inference.stream
    assert inference.wants_usage
    plain = parse('{"model":"a","stream":null,"stream_options":null,"n":null,"provider":null}')
    assert (plain.stream, plain.wants_usage, plain.precisions, plain.floor) == (False, False, None, Floor())


@pytest.mark.parametrize("kind", ["", "text/plain", "application/jsonp", "x" * 10_000])
def test_other_kinds_of_body(kind: str) -> None:
    """A body that isn't declared as JSON is not read; a browser's form could send one unasked."""
    with pytest.raises(RequestError, match="send application/json") as caught:
        parse('{"model":"a"}', content_type=kind)
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_however_it_is_declared(kind: str) -> None:
    """Case and parameters of the content type don't matter."""
    assert parse('{"model":"a"}', content_type=kind).model == "a"


@pytest.mark.parametrize("name", sorted(GUARDED_FIELDS))
def test_guarded_fields(name: str) -> None:
    """A field that is the operator's to use reaches a replica only for callers that may use it."""
    body = f'{{"model":"a","x":1,"{name}":{{"y":1}}}}'
    assert sent(body) == {"model": "m1", "x": 1}
    assert sent(body, CHAT, name) == {"model": "m1", "x": 1, name: {"y": 1}}


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, MESSAGES], ids=lambda each: each.name)
def test_arguments_of_a_template(endpoint: Endpoint) -> None:
    """What a template reads is passed on with its bytes; what would go to the tokenizer instead is not."""
    fine = '{"enable_thinking": false, "documents": [1.0]}'
    assert fine.encode() in parse(f'{{"model":"a","chat_template_kwargs":{fine}}}', endpoint).body_for("m1")
    for name in GUARDED_KWARGS:
        body = f'{{"model":"a","chat_template_kwargs":{{"x":1,"{name}":true}}}}'
        assert sent(body, endpoint)["chat_template_kwargs"] == {"x": 1}
    body = '{"model":"a","chat_template_kwargs":{"chat_template":"t"}}'
    assert sent(body, endpoint, "chat_template")["chat_template_kwargs"] == {"chat_template": "t"}
    assert sent('{"model":"a","chat_template_kwargs":null}', endpoint)["chat_template_kwargs"] is None


def test_nobody_may_send_what_is_ours() -> None:
    """`provider` is never the engine's, whatever a caller may."""
    assert sent('{"model":"a","provider":{}}', CHAT, "provider") == {"model": "m1"}


@pytest.mark.parametrize(
    "endpoint, given, expected",
    [
        (CHAT, {}, {"max_completion_tokens": 10}),
        (CHAT, {"max_tokens": None}, {"max_tokens": None, "max_completion_tokens": 10}),
        (CHAT, {"max_tokens": 10}, {"max_tokens": 10}),
        (CHAT, {"max_completion_tokens": 3}, {"max_completion_tokens": 3}),
        (COMPLETIONS, {}, {"max_tokens": 10}),
        (RESPONSES, {}, {"max_output_tokens": 10, "store": False}),
        (MESSAGES, {"max_tokens": 0}, {"max_tokens": 0}),
        (EMBEDDINGS, {}, {}),
    ],
)
def test_length_of_answers(endpoint: Endpoint, given: dict[str, Any], expected: dict[str, Any]) -> None:
    """A key's limit is asked for where the client names none, and left alone where it names a lower one."""
    body = json.dumps({"model": "a", **given})
    assert sent(body, endpoint, max_tokens=10) == {"model": "m1", **expected}
    # vLLM refuses more than its context, and its own default for completions is 16.
    filled = parse(body, endpoint, max_tokens=10).body_for("m1", context_tokens=8)
    assert json.loads(filled) == {
        "model": "m1",
        **expected,
        **{key: 8 for key, value in expected.items() if key not in given and value == 10},
    }
    assert sent('{"model":"a"}', COMPLETIONS, max_tokens=16) == {"model": "m1"}


@pytest.mark.parametrize(
    "endpoint, key, value",
    [
        (CHAT, "max_tokens", "11"),
        (CHAT, "max_completion_tokens", "11"),
        (RESPONSES, "max_output_tokens", "11"),
        (MESSAGES, "max_tokens", "11"),
        (COMPLETIONS, "max_tokens", '"11"'),
        (CHAT, "max_tokens", "11.0"),
    ],
)
def test_answers_that_are_too_long(endpoint: Endpoint, key: str, value: str) -> None:
    """More than a key may ask for is refused by name."""
    with pytest.raises(RequestError) as caught:
        parse(f'{{"model":"a","{key}":{value}}}', endpoint, max_tokens=10)
    assert caught.value.param == key
    assert parse(f'{{"model":"a","{key}":{value}}}', endpoint).model


@pytest.mark.parametrize(
    "field", ['"background":true', '"previous_response_id":"resp_1"', '"conversation":{"id":"conv_1"}']
)
def test_answers_are_kept_nowhere(field: str) -> None:
    """A response can't go on from an earlier one, for that may have come from another replica."""
    with pytest.raises(RequestError, match="is not supported") as caught:
        parse(f'{{"model":"a",{field}}}', RESPONSES)
    assert (caught.value.code, caught.value.param) == ("unsupported", field.split('"')[1])
    assert parse(f'{{"model":"a",{field}}}', CHAT).model


def test_a_response_is_not_stored() -> None:
    """Whatever a client wishes; harmless forms of the other keys pass."""
    assert sent('{"model":"a"}', RESPONSES) == {"model": "m1", "store": False}
    body = '{"model":"a","store":true,"background":false,"previous_response_id":null}'
    assert sent(body, RESPONSES)["store"] is False


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=lambda each: each.name)
def test_every_endpoint(endpoint: Endpoint) -> None:
    """Precision, floor and the served name work everywhere; streaming and its options only where there are any."""
    body = '{"model":"a","stream":true,"provider":{"quantizations":["int8"]}}'
    inference = parse(body, endpoint, x_quantgate_floor="kl_mean=0.1")
    assert (inference.precisions, inference.floor) == (frozenset({"int8"}), Floor(kl_mean=0.1))
    assert inference.stream == endpoint.generates
    passed = json.loads(inference.body_for("m1"), parse_int=str)
    assert passed["model"] == "m1"
    assert ("stream_options" in passed) == endpoint.takes_stream_options
    assert endpoint is ENDPOINTS[endpoint.name]


@pytest.mark.parametrize(
    "given_options, sent_options",
    [
        ("", {"include_usage": True}),
        (',"stream_options":null', {"include_usage": True}),
        (',"stream_options":{}', {"include_usage": True}),
        (',"stream_options":{"include_usage":false}', {"include_usage": True}),
        (',"stream_options":{"x":1.0}', {"x": 1.0, "include_usage": True}),
        (',"stream_options":{"continuous_usage_stats":true}', {"include_usage": True}),
    ],
)
def test_usage_is_always_asked_for(given_options: str, sent_options: dict[str, Any]) -> None:
    """A stream's usage is asked for, so that tokens are metered, whatever the client wants to see."""
    assert sent(f'{{"model":"a","stream":true{given_options}}}')["stream_options"] == sent_options


def test_options_that_ask_for_usage_pass_as_they_are() -> None:
    """Who asks for usage has its own bytes sent, and without a stream nothing is added."""
    options = '{"include_usage": true, "x": 1.0}'
    body = parse(f'{{"model":"a","stream":true,"stream_options":{options}}}').body_for("m1")
    assert body == b'{"model":"m1","stream":true,"stream_options":' + options.encode() + b"}"
    assert parse('{"model":"a"}').body_for("m1") == b'{"model":"m1"}'


@pytest.mark.parametrize(
    "values, stream, wants_usage",
    [
        ('"stream":"yes","stream_options":{"include_usage":"true"}', True, True),
        ('"stream":1,"stream_options":{"include_usage":1.0}', True, True),
        ('"stream":"false"', False, False),
        ('"stream":0.0', False, False),
    ],
)
def test_values_are_read_as_vllm_reads_them(values: str, stream: bool, wants_usage: bool) -> None:
    """pydantic takes some texts and numbers for true or false; the replica gets them as the client wrote them."""
    body = f'{{"model":"a",{values}}}'
    inference = parse(body)
    assert (inference.stream, inference.wants_usage) == (stream, wants_usage)
    assert inference.body_for("a").startswith(body[:-1].encode())


@given(st.one_of(st.floats(-5, 5), st.integers(-2, 3), st.booleans(), st.text("0123.trueyno \x2d", max_size=6)))
def test_lax_values_are_those_of_pydantic(value: object) -> None:
    """Whatever a field of vLLM's models would be read as, or refused, is what the gateway goes by."""
    for decoder, adapter in ((INTEGER, TypeAdapter(int | None)), (FLAG, TypeAdapter(bool | None))):
        raw = json.dumps(value).encode()
        try:
            expected = adapter.validate_json(raw)
        except ValueError:
            with pytest.raises(msgspec.ValidationError):
                decoder.decode(raw)
        else:
            assert decoder.decode(raw) == expected
