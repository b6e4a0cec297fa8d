"""Reading a request: what is decided on is read, everything else keeps its bytes."""

import json
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import Floor, LimitSettings
from gateway.api.inference import Inference, parse_inference
from gateway.errors import RequestError

LIMITS = LimitSettings(n=4)
RAW = msgspec.json.Decoder(dict[str, msgspec.Raw])

# Values whose bytes a parse and a dump would change.
DELICATE = [
    *("1.0", "1E5", "-0", "-0.0", "1e400", "123456789012345678901234567890", "0.1000", "3.0000000000000004"),
    *('"caf\\u00e9"', '"café 汉字"', '"\\ud83d\\ude00"', '"\\/"', '""', "null", "true"),
    *('{"b": 1, "a": 2, "b": 3}', "[1 ,2,\t3]", '{"z":{"y":[]}}'),
]
OURS = {"model", "stream", "stream_options", "n", "provider"}


def parse(body: str | bytes, **headers: str) -> Inference:
    """Parse a body as the chat endpoint does; headers with _ for -."""
    data = body.encode() if isinstance(body, str) else body
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return parse_inference("chat.completions", data, named, LIMITS)


def sent(body: str) -> dict[str, Any]:
    """What a replica gets for a body."""
    read: dict[str, Any] = json.loads(parse(body).body_for("m1"))
    return read


names = st.text(st.characters(codec="utf-8", exclude_characters='"\\', min_codepoint=32), max_size=8)
values = st.sampled_from(DELICATE) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
).map(json.dumps)


@given(st.dictionaries(names.filter(lambda name: name not in OURS), values, max_size=6), st.booleans())
def test_unknown_fields_keep_their_bytes(fields: dict[str, str], stream: bool) -> None:
    """Whatever a client sends beside what we read reaches the replica with the same bytes, in the same order."""
    known = {"model": '"smol"', "stream": json.dumps(stream), "provider": '{"quantizations": ["int4"]}'}
    body = " , ".join(f'"{name}" : {value}' for name, value in {**fields, **known}.items())
    passed = {name: bytes(raw).decode() for name, raw in RAW.decode(parse(f"{{ {body} }}").body_for("m1")).items()}
    asked_usage = {"stream_options": '{"include_usage":true}'} if stream else {}
    assert list(passed.items()) == list(
        {**fields, "model": '"m1"', "stream": json.dumps(stream), **asked_usage}.items()
    )


@given(st.binary(max_size=64) | values.map(str.encode))
def test_any_bytes_are_a_request_or_a_refusal(body: bytes) -> None:
    """No body makes the gateway itself fail."""
    with suppress(RequestError):
        assert parse(body).model


DEEP = 100_000


@pytest.mark.parametrize(
    "body, param, code, words",
    [
        ("", None, "invalid_json", "the body is no JSON object: Input data was truncated"),
        ("[]", None, "invalid_json", "the body is no JSON object"),
        ('{"model": "a"', None, "invalid_json", "no JSON object"),
        ('{"model": "a"} x', None, "invalid_json", "trailing"),
        ('{"model": "a", "x": NaN}', None, "invalid_json", "malformed"),
        (b'{"model\xff": "a"}', None, "invalid_json", "can't decode"),
        ('{"model": "a", "x": ' + "[" * DEEP + "]" * DEEP + "}", None, "invalid_json", "recursion"),
        ("{}", "model", "invalid_request", "'model' is missing; GET /v1/models lists the names"),
        ('{"model": ""}', "model", "invalid_request", "'model' is missing"),
        ('{"model": null}', "model", "invalid_request", "Expected `str`"),
        ('{"model": 7}', "model", "invalid_request", "'model': Expected `str`, got `int`"),
        (b'{"model": "\xff"}', "model", "invalid_request", "can't decode"),
        ('{"model": "a", "n": 5}', "n", "invalid_request", "'n' is 5, the limit is 4"),
        ('{"model": "a", "n": "4"}', "n", "invalid_request", "'n': Expected `int | null`, got `str`"),
        ('{"model": "a", "n": 1' + "0" * 30 + "}", "n", "invalid_request", "the limit is 4"),
        ('{"model": "a", "x": "\\ud800"}', None, "invalid_json", "no JSON object"),
        ('{"model": "a", "stream": "yes"}', "stream", "invalid_request", "Expected `bool | null`"),
        ('{"model": "a", "stream_options": 1}', "stream_options", "invalid_request", "Expected `object | null`"),
        ('{"model": "a", "provider": []}', "provider", "invalid_request", "Expected `object | null`"),
        (
            '{"model": "a", "provider": {"quantizations": "int8"}}',
            *("provider.quantizations", "invalid_request", "no list of names such as int8"),
        ),
        (
            '{"model": "a", "provider": {"quantizations": [8]}}',
            *("provider.quantizations", "invalid_request", "no list of names"),
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
    assert (inference.endpoint, inference.model) == ("chat.completions", "a")
    assert inference.stream
    assert inference.wants_usage
    plain = parse('{"model":"a","stream":null,"stream_options":null,"n":null,"provider":null}')
    assert (plain.stream, plain.wants_usage, plain.precisions, plain.floor) == (False, False, None, Floor())


def test_the_last_of_two_equal_keys_counts() -> None:
    """A key written twice means one thing to the gateway and to the replica."""
    assert parse('{"model":"a","n":1,"model":"b"}').model == "b"
    assert parse('{"model":"a","n":1,"x":1,"x":2}').body_for("m1") == b'{"model":"m1","n":1,"x":2}'


@pytest.mark.parametrize(
    "given_options, sent_options",
    [
        ("", {"include_usage": True}),
        (',"stream_options":null', {"include_usage": True}),
        (',"stream_options":{}', {"include_usage": True}),
        (',"stream_options":{"include_usage":false}', {"include_usage": True}),
        (',"stream_options":{"x":1.0}', {"x": 1.0, "include_usage": True}),
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
    "named, header, expected",
    [
        (None, None, None),
        ([], None, None),
        (["int8"], None, {"int8"}),
        (["int8", "bf16"], None, {"int8", "bf16"}),
        (None, "int8, bf16", {"int8", "bf16"}),
        (None, "int8,", {"int8"}),
        (["int8", "bf16"], "int8,int4", {"int8"}),
        (["int8"], "int4", set()),
    ],
)
def test_precisions(named: list[str] | None, header: str | None, expected: set[str] | None) -> None:
    """Precisions come from `provider.quantizations`, from the header, or from both, which must then agree."""
    body = json.dumps({"model": "a", "provider": {"quantizations": named, "order": ["x"]}})
    headers = {"x_quantgate_precision": header} if header is not None else {}
    assert parse(body, **headers).precisions == expected


@pytest.mark.parametrize(
    "header, expected",
    [
        ("", Floor()),
        ("top1_agreement=0.98", Floor(top1_agreement=0.98)),
        (" kl_mean = 0.01 , perplexity_ratio=1.02,", Floor(kl_mean=0.01, perplexity_ratio=1.02)),
    ],
)
def test_floors(header: str, expected: Floor) -> None:
    """The floor header names measures with limits."""
    assert parse('{"model":"a"}', x_quantgate_floor=header).floor == expected


@pytest.mark.parametrize(
    "header, words",
    [
        ("speed=1", "'speed' is no measure; known: top1_agreement, kl_mean, perplexity_ratio"),
        ("top1_agreement", "'top1_agreement' has no number"),
        ("top1_agreement=high", "'top1_agreement=high' has no number"),
        ("top1_agreement=1.5", "out of range"),
        ("kl_mean=-1", "out of range"),
        ("kl_mean=nan", "out of range"),
        ("top1_agreement=nan", "out of range"),
    ],
)
def test_floors_that_make_no_sense(header: str, words: str) -> None:
    """A floor that can't be understood is refused: it must never turn into none."""
    with pytest.raises(RequestError) as caught:
        parse('{"model":"a"}', x_quantgate_floor=header)
    assert words in caught.value.message
    assert caught.value.param == "x-quantgate-floor"
