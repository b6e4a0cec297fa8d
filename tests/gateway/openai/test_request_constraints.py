"""Precisions and floors of a request."""

import json

import pytest

from config.schema import Floor
from gateway.errors import RequestError
from gateway.openai.endpoints import CHAT
from gateway.openai.request import parse_request
from tests.gateway.openai.parsing import JSON, LIMITS, parse


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
    named_too = JSON if header is None else {**JSON, b"x-quantgate-precision": header.encode()}
    assert parse_request(CHAT, body.encode(), named_too, LIMITS).precisions == expected


@pytest.mark.parametrize(
    "header, expected",
    [
        ("", Floor()),
        ("top1_agreement=0.98", Floor(top1_agreement=0.98)),
        (" kl_mean = 0.01 , perplexity_ratio=1.02,", Floor(kl_mean=0.01, perplexity_ratio=1.02)),
        ("kl_p99=0.5,length_ratio=1.1", Floor(kl_p99=0.5, length_ratio=1.1)),
    ],
)
def test_floors(header: str, expected: Floor) -> None:
    """The floor header names measures with limits."""
    assert parse('{"model":"a"}', x_quantgate_floor=header).floor == expected


@pytest.mark.parametrize(
    "header, words",
    [
        ("speed=1", "unknown measure 'speed'; known: top1_agreement, kl_mean, perplexity_ratio, kl_p99, length_ratio"),
        ("top1_agreement", "'top1_agreement' is not MEASURE=NUMBER"),
        ("top1_agreement=high", "'top1_agreement=high' is not MEASURE=NUMBER"),
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
