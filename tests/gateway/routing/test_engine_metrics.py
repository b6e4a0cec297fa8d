"""Parsing the metrics page of an engine."""

import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.engine_metrics import (
    GENERATED_TOKENS,
    KV_USAGE,
    READ_TOKENS,
    RUNNING,
    WAITING,
    WANTED,
    EngineMetrics,
    PollResult,
    parse_metrics,
)
from tests.gateway.handlers.pages import CACHE, LOAD, page_of

NOTHING: frozenset[str] = frozenset()
NOW = 7.5
LOADED = EngineMetrics(NOW, 3.0, 2.0, 0.25, 4096, 1234567.0, 4321.0)

NUMBERS = st.floats(min_value=0, max_value=1e12)
ENGINES = st.lists(NUMBERS, min_size=1, max_size=4)
ODD = ("NaN", "nan", "+Inf", "-Inf", "-1", "1e999", "1.2.3", "", "zero", "1_0", "0x1", "--1", "1,5", "e")


@pytest.mark.parametrize("others", [True, False])
def test_a_page(others: bool) -> None:
    """The metrics are found among 740 others, also among those whose names begin alike."""
    page = page_of(LOAD, others=others)
    assert not others or (page.count(b"\n") > 700 and len(page) > 60_000)
    assert parse_metrics(page, NOW) == (LOADED, NOTHING)


def test_several_engines() -> None:
    """The values of several engines are added; the KV usage is their mean."""
    samples = {**dict.fromkeys(WANTED, ("1.0", "2.0")), KV_USAGE: ("0.25", "0.75")}
    poll, missing = parse_metrics(page_of(samples, (CACHE, CACHE)), NOW)
    assert poll == EngineMetrics(NOW, 3.0, 3.0, 0.5, 8192, 3.0, 3.0)
    assert not missing


@pytest.mark.parametrize("name", WANTED)
def test_a_missing_metric(name: str) -> None:
    """A missing metric is named and None, not zero; all others are read."""
    poll, missing = parse_metrics(page_of({other: value for other, value in LOAD.items() if other != name}), NOW)
    fields = dict(zip(WANTED, ("running", "waiting", "kv_usage", "read_tokens", "generated_tokens"), strict=True))
    assert missing == {name}
    for each, field in fields.items():
        assert getattr(poll, field) == (None if each == name else getattr(LOADED, field))
    assert poll.tells_load == (name not in (RUNNING, WAITING))


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("engines", [("{}",), ("{}", "1.0"), ("1.0", "{}")])
def test_invalid_numbers(odd: str, engines: tuple[str, ...]) -> None:
    """An invalid value of one engine makes the metric missing, even if other engines have valid ones."""
    poll, missing = parse_metrics(page_of({**LOAD, RUNNING: [value.format(odd) for value in engines]}), NOW)
    assert poll.running is None
    assert missing == {RUNNING}
    assert (poll.waiting, poll.kv_usage) == (2.0, 0.25)


def test_sums_that_overflow() -> None:
    """A sum that is infinite makes the metric missing."""
    assert parse_metrics(page_of({**LOAD, WAITING: ("1e308", "1e308")}), NOW)[1] == {WAITING}


@pytest.mark.parametrize(
    "page, running",
    [
        (b"vllm:num_requests_running 4", 4),
        (b"vllm:num_requests_running 4 1700000000000\n", 4),
        (b"vllm:num_requests_running\t4\n", None),
        (b"vllm:num_requests_running{} 4\r\n", 4),
        (b'vllm:num_requests_running{a="\\"} 9"}  4\n', 4),
        (b'vllm:num_requests_running{a="\\\\"} 4\nvllm:num_requests_running{a="\\n"} 5\nx 1\n', 9),
        (b'vllm:num_requests_running{a="} 4\n', None),
        (b"vllm:num_requests_running{} 4\nvllm:num_requests_running", 4),
        (b"vllm:num_requests_running{} 4\nvllm:num_requests_running{", None),
        (b"# vllm:num_requests_running 4\nxvllm:num_requests_running 4\n", None),
        (b"", None),
        (b"\xff\x00vllm:num_requests_running 4\n", None),
    ],
)
def test_lines(page: bytes, running: float | None) -> None:
    """The text format allows braces and quotes in labels, timestamps, and a last line without a newline."""
    assert parse_metrics(page, NOW)[0].running == running


@pytest.mark.parametrize(
    "caches, tokens",
    [
        (('block_size="16",num_gpu_blocks="256"',), 4096),
        (('num_gpu_blocks="256",kv_cache_size_tokens="None",block_size="16"',), 4096),
        (('block_size="16",num_gpu_blocks="256",kv_cache_size_tokens="100"',), 100),
        (('kv_cache_size_tokens="100"', 'block_size="16",num_gpu_blocks="2"'), 132),
        (('kv_cache_size_tokens="100"', 'block_size="16"'), None),
        (('block_size="16",num_gpu_blocks="None"',), None),
        (('mamba_block_size="16",num_gpu_blocks="256"',), None),
        (('kv_cache_size_tokens="0"',), None),
        ((f'kv_cache_size_tokens="{"9" * 5000}"',), None),
        (('a="\\",kv_cache_size_tokens=\\"5\\""',), None),
        ((), None),
    ],
)
def test_kv_capacity(caches: Iterable[str], tokens: int | None) -> None:
    """The capacity is the reported size, or blocks times block size; without either it is None, and not missing."""
    poll, missing = parse_metrics(page_of(LOAD, caches), NOW)
    assert poll.kv_capacity_tokens == tokens
    assert not missing


@given(
    st.dictionaries(st.sampled_from(WANTED), ENGINES),
    st.booleans(),
    st.sampled_from(["{!r}", "{:.17g}", "{:.17e}"]),
)
def test_any_load(loads: dict[str, list[float]], others: bool, written: str) -> None:
    """Any valid values are read exactly, and absent metrics are missing."""
    page = page_of(
        {name: [written.format(number) for number in numbers] for name, numbers in loads.items()}, others=others
    )
    poll, missing = parse_metrics(page, NOW)
    assert missing == set(WANTED) - loads.keys()
    values = (poll.running, poll.waiting, poll.kv_usage, poll.read_tokens, poll.generated_tokens)
    for name, value in zip(WANTED, values, strict=True):
        numbers = loads.get(name)
        if numbers is None:
            assert value is None
        else:
            assert value == pytest.approx(math.fsum(numbers) / (len(numbers) if name == KV_USAGE else 1))


@given(
    st.lists(
        st.sampled_from([*(name.encode() for name in WANTED), b"{", b"}", b'"', b"\\", b" ", b"\n", b"1", b"a=", b","])
    )
)
def test_any_bytes(parts: list[bytes]) -> None:
    """Any bytes are parsed: a value is None and missing, or else finite and not negative."""
    poll, missing = parse_metrics(b"".join(parts), NOW)
    values = (poll.running, poll.waiting, poll.kv_usage, poll.read_tokens, poll.generated_tokens)
    for name, value in zip(WANTED, values, strict=True):
        assert (value is None) == (name in missing)
        assert value is None or (value >= 0 and math.isfinite(value))


@pytest.mark.parametrize("end", range(0, 1200, 7))
def test_a_truncated_page(end: int) -> None:
    """A truncated page is read up to its end."""
    poll, missing = parse_metrics(page_of(LOAD, others=False)[:end], NOW)
    assert (poll.generated_tokens is None) == (GENERATED_TOKENS in missing)
    assert (poll.read_tokens is None) == (READ_TOKENS in missing)


def test_a_failed_poll() -> None:
    """After a failed poll the load is unknown; the time of the last page and its missing metrics are kept."""
    result = PollResult(LOADED, 7.0, frozenset({RUNNING}))
    assert result.unanswered() == PollResult(None, 7.0, frozenset({RUNNING}), answers=False)
