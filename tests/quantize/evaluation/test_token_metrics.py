"""TokenMetrics between logits: exact whatever the slices, and in little memory."""

import math
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.measurements import TokenSums
from tests.quantize.command_line import ROOT, environ

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")

from quantize.evaluation import token_metrics  # noqa: E402
from quantize.evaluation.token_metrics import (  # noqa: E402
    TokenMetrics,
    compare,
    token_sums,
)


def slices(logits: Any) -> Any:
    """Logits as a model that makes them slice by slice, each anew."""
    return lambda first, last: logits[:, first:last].clone()


def compared(parent: Any, variant: Any, targets: Any) -> TokenMetrics:
    """Compare whole logits."""
    return compare(slices(parent), slices(variant), targets, parent.shape[1])


def test_known_distributions_give_known_distances() -> None:
    """KL(parent||variant) in nats, likelihoods and agreement match a hand calculation."""
    parent = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1]]))
    variant = torch.log(torch.tensor([[0.25, 0.75], [0.9, 0.1]]))
    found = compared(parent, variant, torch.tensor([1, 0]))
    assert found.divergence.tolist() == pytest.approx([0.143841, 0.0], abs=1e-5)
    assert found.nll_parent.tolist() == pytest.approx([0.693147, 0.105361], abs=1e-5)
    assert found.nll_variant.tolist() == pytest.approx([0.287682, 0.105361], abs=1e-5)
    assert found.agreed.tolist() == [False, True]


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 1.0, 30.0]), size=st.integers(1, 97))
@settings(deadline=None, max_examples=40)
def test_slices_give_what_the_whole_gives(seed: int, scale: float, size: int) -> None:
    """For any vocabulary and slice size the figures are those of one softmax over everything in fp64."""
    generator = torch.Generator().manual_seed(seed)
    parent = torch.randn(5, 97, generator=generator) * 10
    variant = parent + torch.randn(5, 97, generator=generator) * scale
    targets = torch.randint(0, 97, (5,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_metrics, "VOCABULARY_SLICE", size)
        found = compared(parent, variant, targets)
    ours, theirs = parent.double().log_softmax(-1), variant.double().log_softmax(-1)
    exact = (ours.exp() * (ours - theirs)).sum(-1)
    # Gaps between logits are rounded to fp32, and what is left of them may be far smaller.
    assert torch.allclose(found.divergence, exact, rtol=1e-5, atol=1e-6 * max(1.0, scale))
    assert torch.allclose(found.nll_variant, -theirs.gather(-1, targets[:, None])[:, 0], atol=1e-5)
    assert torch.equal(found.agreed, parent.argmax(-1) == variant.argmax(-1))


def test_tokens_that_the_parent_rules_out_count_nothing() -> None:
    """A vocabulary padded with -inf changes nothing, even where a whole slice is padding."""
    parent, variant, targets = torch.randn(3, 50), torch.randn(3, 50), torch.tensor([1, 2, 3])
    padding = torch.full((3, token_metrics.VOCABULARY_SLICE), -torch.inf)
    plain = compared(parent, variant, targets)
    padded = compared(torch.cat([parent, padding], 1), torch.cat([variant, padding], 1), targets)
    assert torch.allclose(plain.divergence, padded.divergence)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_show(bad: float) -> None:
    """A NaN or an infinity on either side never passes for a small distance."""
    good, broken = torch.randn(2, 9), torch.randn(2, 9)
    broken[1, 4] = bad
    for pair in ((good, broken), (broken, good)):
        found = compared(*pair, torch.tensor([0, 0]))
        assert torch.isfinite(found.divergence).tolist() == [True, False]


def test_figures_can_be_restricted_to_some_tokens() -> None:
    """Sums are over the flagged tokens alone."""
    agreed = torch.tensor([True, False, True])
    nll = torch.zeros(3, dtype=torch.float64)
    found = TokenMetrics(torch.tensor([1.0, 3.0, 100.0]).double(), nll, nll + math.log(2), agreed)
    told = token_sums(found, torch.tensor([True, True, False]))
    assert (told.tokens, told.divergence, told.agreed) == (2, 4.0, 1)
    assert told.excess_nll == pytest.approx(2 * math.log(2))
    assert token_sums(found, torch.tensor([False, False, False])) == TokenSums()


PEAK = """
import torch
from functools import partial
from quantize.evaluation.token_metrics import compare
from quantize.evaluation.lm_head import LmHead

def peak_bytes():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

tokens, vocabulary, width = 512, 200_000, 8
readout = LmHead(torch.randn(vocabulary, width), None, 1.0, 0.0)
ours, theirs, targets = torch.randn(tokens, width), torch.randn(tokens, width), torch.zeros(tokens, dtype=torch.long)
compare(partial(readout.logits, ours[:4]), partial(readout.logits, theirs[:4]), targets[:4], vocabulary)
before = peak_bytes()
compare(partial(readout.logits, ours), partial(readout.logits, theirs), targets, vocabulary)
print((peak_bytes() - before) / (4 * tokens * vocabulary))
"""


def test_memory_stays_under_two_copies_of_a_batchs_logits() -> None:
    """With 512 positions and 200,000 tokens both models are compared in a fraction of one copy (410 MB)."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=ROOT, env=environ(), capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.5


def test_partial_application_is_what_models_pass() -> None:
    """A readout's method bound to states serves as logits."""
    from quantize.evaluation.lm_head import WHOLE  # noqa: PLC0415

    logits = torch.randn(2, 7)
    found = compare(partial(WHOLE.logits, logits), partial(WHOLE.logits, logits.clone()), torch.tensor([0, 1]), 7)
    assert found.divergence.tolist() == [0, 0]
    assert torch.isfinite(logits).all()
