"""The independent check of a manifest's figures: its arithmetic and its verdict; test_real_model.py runs it."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.quality import Quality
from tests.benchmarks.figures import Figures, Sums, TokenSample, lumped_divergence
from tests.benchmarks.machine import Usage
from tests.benchmarks.quantize import LayerTime, Round, last_layer, order_of, qwq_table, rounds_table
from tests.benchmarks.reproduce import differences, table
from tests.benchmarks.vllm_figures import Place, add_sample, read_places

SEALED = Quality(
    dataset_sha256="0", tokens=3, kl_mean=0.2, kl_p99=1.0, top1_agreement=0.5, perplexity_ratio=1.1, verdict="pass"
)


def logprobs(weights: list[int]) -> dict[int, float]:
    """A distribution over tokens from whole weights, as log-probabilities."""
    return {token: math.log(weight / sum(weights)) for token, weight in enumerate(weights)}


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=3, max_size=30), st.data())
def test_lumping_never_adds_divergence(weights: list[tuple[int, int]], data: st.DataObject) -> None:
    """With every token named it is the KL; with some left out it is no larger, and never below 0."""
    parent, variant = (logprobs([pair[side] for pair in weights]) for side in (0, 1))
    whole = sum(math.exp(parent[token]) * (parent[token] - variant[token]) for token in parent)
    assert lumped_divergence(parent, variant) == pytest.approx(whole, abs=1e-9)
    left_out = data.draw(st.sets(st.integers(0, len(weights) - 1), max_size=len(weights) - 1))
    named = {token: value for token, value in variant.items() if token not in left_out}
    assert -1e-9 <= lumped_divergence(parent, named) <= whole + 1e-9


def test_a_sample_of_prompt_logprobs() -> None:
    """vLLM's answer is read by rank and token; the first token of a prompt has no prediction."""
    told: list[dict[str, Any] | None] = [
        None,
        {"5": {"logprob": math.log(0.75), "rank": 1}, "9": {"logprob": math.log(0.25), "rank": 2}},
    ]
    (parent,) = read_places(told)
    assert parent == Place(5, {5: math.log(0.75), 9: math.log(0.25)})
    variant = Place(9, {5: math.log(0.25), 9: math.log(0.75)})
    sums = Sums()
    add_sample(sums, TokenSample([1, 9, 9], [True, False]), [parent, variant], [variant, variant])
    figures = sums.figures()
    assert figures.kl_mean == pytest.approx(0.5 * math.log(3))
    assert figures.perplexity_ratio == pytest.approx(1 / 3)
    assert (figures.tokens, figures.top1_agreement) == (1, 0.0)


@pytest.mark.parametrize(
    "again,worst",
    [
        (Figures(3, 0.2, 0.5, 1.1), 0.0),
        (Figures(3, 0.201, 0.5, 1.1), 0.005),
        (Figures(3, 0.2, 0.45, 1.1), 0.1),
        (Figures(4, 0.2, 0.5, 1.1), 1 / 3),
    ],
)
def test_differences_are_relative(again: Figures, worst: float) -> None:
    """Each figure is held against the sealed one, the number of tokens, too."""
    found = differences(SEALED, again)
    assert max(disposable.relative for disposable in found) == pytest.approx(worst)
    assert table(found).count("\n") == 5


def test_rounds_alternate_and_are_told() -> None:
    """Each side goes first once in two rounds; the median ratio closes the table."""
    assert order_of(0) == tuple(reversed(order_of(1)))
    rounds = [Round(Usage(10.4, 10**9), Usage(10.0, 10**9)), Round(Usage(10.0, 10**9), Usage(10.0, 10**9))]
    assert "| 1 | 10.4 s | 10.0 s | 1.040 | 1,000 MB | 1,000 MB |" in rounds_table(rounds)
    assert "Median ratio 1.020" in rounds_table(rounds)


def test_a_layers_time_from_marks() -> None:
    """The last layer begins where the one before it was packed; times 64 is the whole model."""
    marks = [("solved", 0, 10.0), ("packed", 0, 12.0), ("solved", 1, 14.0), ("solved", 1, 20.0), ("packed", 1, 21.5)]
    assert last_layer(marks) == LayerTime(solving=8.0, packing=1.5)
    assert "| solving | 8.0 s | 8.5 min | 110 min |" in qwq_table(last_layer(marks), 30.0, Usage(30.0, 10**9))
