"""Reading what an engine says of its load."""

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
    """Found among 740 lines as well as alone, and no other metric whose name begins alike is taken for one."""
    page = page_of(LOAD, others=others)
    assert not others or (page.count(b"\n") > 700 and len(page) > 60_000)
    assert parse_metrics(page, NOW) == (LOADED, NOTHING)


def test_several_engines() -> None:
    """What engines have is added up; their KV usage is a mean."""
    samples = {**dict.fromkeys(WANTED, ("1.0", "2.0")), KV_USAGE: ("0.25", "0.75")}
    poll, missing = parse_metrics(page_of(samples, (CACHE, CACHE)), NOW)
    assert poll == EngineMetrics(NOW, 3.0, 3.0, 0.5, 8192, 3.0, 3.0)
    assert not missing


@pytest.mark.parametrize("name", WANTED)
def test_a_metric_that_is_not_there(name: str) -> None:
    """It is named, and not zero; all others are read."""
    poll, missing = parse_metrics(page_of({other: said for other, said in LOAD.items() if other != name}), NOW)
    fields = dict(zip(WANTED, ("running", "waiting", "kv_usage", "read_tokens", "generated_tokens"), strict=True))
    assert missing == {name}
    for each, field in fields.items():
        assert getattr(poll, field) == (None if each == name else getattr(LOADED, field))
    assert poll.tells_load == (name not in (RUNNING, WAITING))


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("engines", [("{}",), ("{}", "1.0"), ("1.0", "{}")])
def test_no_number(odd: str, engines: tuple[str, ...]) -> None:
    """A value that says nothing makes its metric a missing one, even if other engines' are numbers."""
    poll, missing = parse_metrics(page_of({**LOAD, RUNNING: [said.format(odd) for said in engines]}), NOW)
    assert poll.running is None
    assert missing == {RUNNING}
    assert (poll.waiting, poll.kv_usage) == (2.0, 0.25)


def test_sums_that_are_no_number() -> None:
    """Numbers too large to add up say nothing either."""
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
    """The text format's own odd cases: braces and quotes in labels, timestamps, no end of the last line."""
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
    """The size itself, or blocks times their size; where an engine tells neither it is unknown, without an alarm."""
    poll, missing = parse_metrics(page_of(LOAD, caches), NOW)
    assert poll.kv_capacity_tokens == tokens
    assert not missing


@given(
    st.dictionaries(st.sampled_from(WANTED), ENGINES),
    st.booleans(),
    st.sampled_from(["{!r}", "{:.17g}", "{:.17e}"]),
)
def test_any_load(said: dict[str, list[float]], others: bool, written: str) -> None:
    """Whatever engines say is what is read, and nothing else is."""
    page = page_of(
        {name: [written.format(number) for number in numbers] for name, numbers in said.items()}, others=others
    )
    poll, missing = parse_metrics(page, NOW)
    assert missing == set(WANTED) - said.keys()
    told = (poll.running, poll.waiting, poll.kv_usage, poll.read_tokens, poll.generated_tokens)
    for name, value in zip(WANTED, told, strict=True):
        numbers = said.get(name)
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
    """No page is too odd to be read; what is unknown is None and named, what is known is a number that can be."""
    poll, missing = parse_metrics(b"".join(parts), NOW)
    told = (poll.running, poll.waiting, poll.kv_usage, poll.read_tokens, poll.generated_tokens)
    for name, value in zip(WANTED, told, strict=True):
        assert (value is None) == (name in missing)
        assert value is None or (value >= 0 and math.isfinite(value))


@pytest.mark.parametrize("end", range(0, 1200, 7))
def test_a_page_cut_off(end: int) -> None:
    """A page without its end is read as far as it goes."""
    poll, missing = parse_metrics(page_of(LOAD, others=False)[:end], NOW)
    assert (poll.generated_tokens is None) == (GENERATED_TOKENS in missing)
    assert (poll.read_tokens is None) == (READ_TOKENS in missing)


def test_nobody_answers() -> None:
    """Without an answer nothing is known of the load; since when, and what the last page lacked, still is."""
    seen = PollResult(LOADED, 7.0, frozenset({RUNNING}))
    assert seen.unanswered() == PollResult(None, 7.0, frozenset({RUNNING}), answers=False)
