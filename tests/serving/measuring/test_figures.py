"""From events to figures: what falls into the window is counted once, and rates add up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.measuring.figures import (
    Chunk,
    Exchange,
    Window,
    load_figures,
    percentile,
    percentiles,
)


@pytest.mark.parametrize(
    "chunks,total,tokens",
    [
        ([(1, 1), (2, 2), (3, 3)], 3, [1, 1, 1]),
        ([(1, 1), (2, 4), (3, 9)], 9, [1, 3, 5]),
        ([(1, 1), (2, 1), (3, 2)], 2, [1, 1]),
        ([(1, None), (2, None)], 6, [3, 3]),
        ([(1, None), (2, None), (3, None)], 8, [2, 3, 3]),
        ([(1, None), (2, None)], None, [1, 1]),
        ([], 0, []),
        ([], None, []),
    ],
)
def test_tokens_of_chunks(chunks: list[tuple[float, int | None]], total: int | None, tokens: list[int]) -> None:
    """Counts come from usage; a chunk without a new token is none, and without usage a chunk is one."""
    exchange = Exchange(0, 10, [Chunk(at, so_far) for at, so_far in chunks], total)
    assert [each.tokens for each in exchange.arrivals()] == tokens


@given(st.integers(1, 50), st.integers(0, 500))
def test_no_token_is_lost(chunks: int, total: int) -> None:
    """However a total is spread over chunks, it stays the total."""
    exchange = Exchange(0, 10, [Chunk(n, None) for n in range(chunks)], total)
    assert sum(each.tokens for each in exchange.arrivals()) == total


@pytest.mark.parametrize(
    "values,percent,value", [([7], 50, 7), ([7], 99, 7), ([1, 2, 3, 4], 50, 2), ([1, 2, 3, 4], 95, 4), ([1, 2], 0, 1)]
)
def test_percentiles_are_values(values: list[float], percent: float, value: float) -> None:
    """The nearest rank, as a table."""
    assert percentile(values, percent) == value


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_ascend(values: list[float]) -> None:
    """Each is one of the values, and the rarer is never below the more frequent."""
    told = percentiles(values)
    assert told is not None
    four = [told.p50, told.p90, told.p95, told.p99]
    assert four == sorted(four)
    assert set(four) <= set(values)


def test_percentiles_of_nothing() -> None:
    """Without a value there is none."""
    assert percentiles([]) is None


def answer(sent: float, *tokens: float, prompt: int = 10, failure: str | None = None) -> Exchange:
    """A request whose tokens came one by one."""
    seen = [Chunk(at, number) for number, at in enumerate(tokens, 1)]
    return Exchange(sent, prompt, seen, None, tokens[-1] if tokens else None, failure)


def test_the_figures_of_a_level() -> None:
    """Two places over ten seconds, by hand."""
    exchanges = [
        answer(99, 100, 101, 102),  # sent before the window: its tokens count, its wait does not
        answer(101, 103, 104, prompt=20),  # waited 2 s
        answer(104, 105, 107, 109, 111),  # waited 1 s; one token after the end
        answer(108, failure="503: busy"),
        answer(109, 112),  # its first token came after the end
    ]
    load = load_figures(2, exchanges, Window(100, 110))
    assert (load.concurrency, load.seconds, load.requests, load.errors) == (2, 10, 2, 1)
    assert load.prefill_tokens_per_second == pytest.approx(30 / 3)
    assert load.decode_tokens_per_second == pytest.approx(5 / (1 + 1 + 1 + 2 + 2))
    assert load.prompt_tokens_per_second == pytest.approx(3.0)
    assert load.output_tokens_per_second == pytest.approx(0.7)
    assert load.time_to_first_token_seconds is not None
    assert load.time_to_first_token_seconds.p99 == 2
    assert load.inter_token_seconds is not None
    assert load.inter_token_seconds.p50 == 1


def test_tokens_that_come_at_once_share_the_time() -> None:
    """Four tokens a second after the first are four gaps of a quarter, not one of a second and three of none."""
    together = Exchange(0.5, 10, [Chunk(1, 1), Chunk(2, 5)])
    load = load_figures(1, [together], Window(0, 3))
    assert load.inter_token_seconds is not None
    assert load.inter_token_seconds.p50 == load.inter_token_seconds.p99 == 0.25
    assert load.decode_tokens_per_second == 4


@pytest.mark.parametrize("exchanges", [[], [answer(1, failure="refused")], [answer(1)]])
def test_nothing_is_no_latency(exchanges: list[Exchange]) -> None:
    """A level that gave no token has no latencies and no rates."""
    load = load_figures(1, exchanges, Window(0, 0))
    assert load.requests == 0
    assert load.time_to_first_token_seconds is None
    assert load.inter_token_seconds is None
    assert load.output_tokens_per_second == load.decode_tokens_per_second == 0


@given(st.lists(st.tuples(st.floats(0, 50), st.lists(st.floats(0.01, 5), max_size=8)), max_size=12))
def test_counts_never_exceed_what_was_sent(requests: list[tuple[float, list[float]]]) -> None:
    """Whatever the times, no request is timed twice and no token counted twice."""
    exchanges = []
    for sent, gaps in requests:
        at, times = sent, []
        for gap in gaps:
            at += gap
            times.append(at)
        exchanges.append(answer(sent, *times))
    load = load_figures(3, exchanges, Window(10, 40))
    assert load.requests <= len(exchanges)
    assert load.output_tokens_per_second * 30 <= sum(len(gaps) for _, gaps in requests) + 1e-6
