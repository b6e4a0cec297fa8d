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
        (None, "bf16,int8\nint8,int4", {"int8"}),
        (None, "bf16\nint8", set()),
        (["int8", "int4"], "bf16,int8,int4\nint4", {"int4"}),
        (["fp4", "unknown"], None, {"fp4", "unknown"}),
    ],
)
def test_precisions(named: list[str] | None, header: str | None, expected: set[str] | None) -> None:
    """Precisions come from `provider.quantizations` and from headers, each of which must accept them."""
    body = json.dumps({"model": "a", "provider": {"quantizations": named, "order": ["x"]}})
    named_too = JSON if header is None else {**JSON, b"x-quantgate-precision": header.encode()}
    assert parse_request(CHAT, body.encode(), named_too, LIMITS).precisions == expected


@pytest.mark.parametrize(
    "named, header, words",
    [
        (None, "int-8", "x-quantgate-precision: unknown precision 'int-8'; known: int4, int8, fp4"),
        (None, "bf16,INT8", "unknown precision 'INT8'"),
        (None, "bf16\nint9", "unknown precision 'int9'"),
        (None, "", "x-quantgate-precision: '' is empty"),
        (None, ",", "',' is empty"),
        (["int8", "q4"], None, "provider.quantizations: unknown precision 'q4'"),
    ],
)
def test_precisions_that_make_no_sense(named: list[str] | None, header: str | None, words: str) -> None:
    """An unknown precision is refused: it would exclude what the client wants."""
    body = json.dumps({"model": "a", "provider": {"quantizations": named}})
    named_too = JSON if header is None else {**JSON, b"x-quantgate-precision": header.encode()}
    with pytest.raises(RequestError) as caught:
        parse_request(CHAT, body.encode(), named_too, LIMITS)
    assert words in caught.value.message
    assert caught.value.param in {"x-quantgate-precision", "provider.quantizations"}


@pytest.mark.parametrize(
    "header, expected",
    [
        ("top1_agreement=0.98", Floor(top1_agreement=0.98)),
        (" kl_mean = 0.01 , perplexity_ratio=1.02,", Floor(kl_mean=0.01, perplexity_ratio=1.02)),
        ("kl_p99=0.5,length_ratio=1.1", Floor(kl_p99=0.5, length_ratio=1.1)),
        ("top1_agreement=0.9,top1_agreement=0.98,top1_agreement=0.95", Floor(top1_agreement=0.98)),
        ("kl_mean=0.02\nkl_mean=0.01,kl_p99=1\nkl_mean=0.03", Floor(kl_mean=0.01, kl_p99=1)),
    ],
)
def test_floors(header: str, expected: Floor) -> None:
    """The floor header names measures with limits; where it is repeated, the strictest limit of each measure counts."""
    assert parse('{"model":"a"}', x_quantgate_floor=header).floor == expected


@pytest.mark.parametrize(
    "header, words",
    [
        ("", "'' is empty; omit the header"),
        (",", "',' is empty"),
        (" , ,", "is empty"),
        ("kl_mean=0.01\n", "'' is empty"),
        ("top1_agreement=0.9,top1_agreement=7", "'top1_agreement=7' is out of range"),
        ("kl_mean=-1,kl_mean=1", "out of range"),
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
