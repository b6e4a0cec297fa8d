"""Paired generations: figures of pairs, sampling, prompts."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.measurements import PairMetrics
from quantize.calibration.thinking import HARMONY, joined
from quantize.evaluation.figures import RATES, increase, length_ratio
from quantize.evaluation.paired_completions import (
    CompletionOutcome,
    ends_in_run,
    pair_metrics,
)
from quantize.evaluation.sampling import Completion, GenerationRequest, cut, noise_seed, read_sampling, rows_at_once
from quantize.evaluation.spans import flags, is_open, last_prompt


def text(length: int, *, finished: bool = True, unclosed: bool = False) -> CompletionOutcome:
    """A generation of so many different tokens."""
    return CompletionOutcome(tuple(range(length)), finished, unclosed)


@pytest.mark.parametrize(
    "ids,expected",
    [
        ([0] * 24, True),
        ([0] * 23, False),
        ([*range(100), *[0] * 24], True),
        ([*[0] * 24, *range(1, 100)], False),
        ([1, 2, 3] * 8, True),
        ([1, 2, 3] * 7, False),
        ([*range(20)] * 3, True),
        ([*range(20)] * 2, False),
        ([9, *[*range(20)] * 3, *range(5)], True),  # cut in the middle of a repeat
        ([*range(200)], False),
        ([], False),
        ([1], False),
    ],
)
def test_a_run_of_repeats_at_the_end_is_a_loop(ids: list[int], expected: bool) -> None:
    """At least 24 tokens at the end say the same at least three times, whatever its length."""
    assert ends_in_run(ids) is expected


@given(unit=st.lists(st.integers(0, 9), min_size=1, max_size=30), before=st.lists(st.integers(10, 99), max_size=30))
def test_every_loop_is_found(unit: list[int], before: list[int]) -> None:
    """Any unit repeated often enough is a loop, whatever came before it."""
    assert ends_in_run([*before, *unit * (24 // len(unit) + 3)])


def paired(parent: Sequence[CompletionOutcome], variant: Sequence[CompletionOutcome]) -> list[PairMetrics]:
    """Metrics of completions of different prompts."""
    requests = [GenerationRequest((), 0, number) for number in range(len(parent))]
    return pair_metrics(requests, parent, variant)


def test_the_length_ratio_is_the_median_of_pairs() -> None:
    """Each pair is compared with itself; pairs that were both cut say nothing."""
    parent = [text(10), text(100), text(50, finished=False), text(50)]
    variant = [text(20), text(100), text(50, finished=False), text(50, finished=False)]
    ratio = length_ratio(paired(parent, variant))
    assert (ratio.value, ratio.units) == (1.0, 4)
    assert (ratio.low, ratio.high) == (0.0, math.inf)


def test_a_ratio_of_nothing_but_cut_texts_is_unknown() -> None:
    """When no text ended itself its length is not known."""
    cut_short = [text(8, finished=False)] * 40
    ratio = length_ratio(paired(cut_short, cut_short))
    assert (ratio.low, ratio.high) == (0.0, math.inf)


def test_empty_texts_have_a_length_ratio() -> None:
    """A text that ends at once counts as one token."""
    assert length_ratio(paired([text(0)], [text(4)])).value == 4.0


def test_increases_are_among_the_pairs_that_tell() -> None:
    """Looping completions of the variant alone are an increase, of both no evidence."""
    looping = CompletionOutcome((5,) * 30, finished=False, unclosed=True)
    pairs = paired([text(9)] * 4 + [looping] * 4, [text(9), text(9), looping, looping] + [looping] * 4)
    for event in RATES:
        assert increase(pairs, event).value == 0.5
    assert increase(paired([looping] * 9, [looping] * 9), "repeating").high == math.inf
    better = increase(paired([looping] * 9, [text(9)] * 9), "unclosed")
    assert better.value == -1.0
    assert better.low <= -1.0 <= better.high < 0


@pytest.mark.parametrize(
    "ids,expected",
    [
        ([5, 6, 2, 2], Completion((5, 6), True)),
        ([5, 6], Completion((5, 6), False)),
        ([2], Completion((), True)),
        ([], Completion((), False)),
    ],
)
def test_a_row_is_cut_where_it_ends_itself(ids: list[int], expected: Completion) -> None:
    """What follows the end is padding, and the end itself is no part of the text."""
    assert cut(ids, (2, 3)) == expected


@pytest.mark.parametrize(
    "token_bytes,tokens,memory_bytes,expected",
    [(262_144, 4000, 80_000_000_000, 7), (46_080, 300, 24_000_000_000, 32), (262_144, 100_000, 80_000_000_000, 1)],
)
def test_rows_fit_into_memory(token_bytes: int, tokens: int, memory_bytes: int, expected: int) -> None:
    """Keys and values take a tenth of the memory; one row is always written."""
    assert rows_at_once(token_bytes, tokens, memory_bytes) == expected


@pytest.mark.parametrize(
    "generation,config,expected",
    [
        ({}, {"eos_token_id": 7}, (0.6, 0.95, 0, (7,))),
        ({"temperature": 0.7, "top_p": 0.8, "top_k": 20, "eos_token_id": [1, 2]}, {}, (0.7, 0.8, 20, (1, 2))),
        ({}, {}, (0.6, 0.95, 0, ())),
    ],
)
def test_a_base_is_sampled_its_own_way(
    tmp_path: Path, generation: dict[str, object], config: dict[str, object], expected: tuple[object, ...]
) -> None:
    """Its generation config decides, with the usual settings for reasoning models where it says nothing."""
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    sampling = read_sampling(tmp_path, 9)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.end_ids) == expected
    assert sampling.new_tokens == 9


@pytest.mark.parametrize(
    "rendered,header,expected",
    [
        ("<u>hi<a>yes<e>", "<a>", "<u>hi<a>"),
        ("<u>hi<a>no<u>more<a>yes<e>", "<a>", "<u>hi<a>no<u>more<a>"),
        ("<u>hi<a><think>\nhm</think>yes", "<a><think>\n", "<u>hi<a><think>\n"),
        ("<u>hi<a>yes<e>", "<a><think>\n", "<u>hi<a><think>\n"),
        ("only text", "<a>", None),
        ("only text", "", None),
    ],
)
def test_a_chat_is_cut_before_its_last_answer(rendered: str, header: str, expected: str | None) -> None:
    """The prompt ends with what the template writes before an answer, an opened think span included."""
    assert last_prompt(rendered, header) == expected


def test_a_chat_of_channels_is_cut_before_its_reasoning() -> None:
    """Reasoning and answer begin with the same header; the prompt has neither."""
    before = "<|start|>user<|message|>hi<|end|><|start|>assistant"
    assert last_prompt(before + joined("hm", "yes", HARMONY), "<|start|>assistant", HARMONY) == before
    assert is_open("<|channel|>analysis<|message|>hm", HARMONY)
    assert not is_open(joined("hm", "yes", HARMONY), HARMONY)


@pytest.mark.parametrize(
    "said,expected",
    [("<think>a", True), ("<think>a</think>b", False), ("a</think>b", False), ("a", False), ("</think><think>", True)],
)
def test_an_open_think_span_shows(said: str, expected: bool) -> None:
    """A span is open if its last tag opens it."""
    assert is_open(said) is expected


@pytest.mark.parametrize(
    "ranges,tokens,expected",
    [
        ([(0, 2)], 4, [True, False, False]),
        ([(1, 2), (3, 9)], 4, [True, False, True]),
        ([], 3, [False, False]),
        ([(0, 0)], 3, [False, False]),
        ([(7, 9)], 3, [False, False]),
    ],
)
def test_flags_are_of_predicted_tokens(ranges: list[tuple[int, int]], tokens: int, expected: list[bool]) -> None:
    """The first token of a sample is predicted by nobody; ranges may lie beyond a cut sample's end."""
    assert flags(ranges, tokens) == expected


def test_every_prompt_and_seed_has_its_own_noise() -> None:
    """Seeds differ in their lower 32 bits, all that torch looks at on a CPU."""
    seeds = {noise_seed(GenerationRequest((1,), seed, number)) for seed in range(10) for number in range(100)}
    assert len(seeds) == 1000
    assert max(seeds) < 2**32
