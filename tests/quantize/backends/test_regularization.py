"""Shrinkage: inverses of Hessians of few tokens that are nearer to the true ones; and damping where it is needed."""

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")

from quantize.backends.layer_checkpoint import LayerCheckpoint  # noqa: E402
from quantize.backends.recording_solver import SolverRecord  # noqa: E402
from quantize.backends.regularization import Regularization, factor  # noqa: E402

pytestmark = pytest.mark.real_model

PLAIN = Regularization(0.0, (0.01,))


def estimate(inputs: int, texts: int, seed: int) -> tuple[Any, Any]:
    """A covariance, and that of so many texts, each of which has directions of its own: the tokens of one are alike."""
    torch.manual_seed(seed)
    sizes = torch.logspace(0, -1, inputs)

    def covariance(number: int) -> Any:
        own = sizes.unsqueeze(1) * torch.randn(inputs, 4 * number)
        return own @ own.T / number + 0.1 * torch.diag(sizes.square())

    return covariance(10_000), covariance(texts)


def charge(true: Any, hessian: Any, regularization: Regularization) -> float:
    """What GPTQ's rounding costs on other text, if its moves are those of an estimate: 4 bits, one scale."""
    torch.manual_seed(7)
    weights = torch.randn(64, len(true))
    step = weights.abs().amax(1) / 7.5
    found = factor(hessian, regularization)
    assert found is not None
    upper, left, rounded = found[0], weights.clone(), torch.zeros_like(weights)
    for column in range(len(true)):
        rounded[:, column] = (left[:, column] / step).round() * step
        error = (left[:, column] - rounded[:, column]) / upper[column, column]
        left[:, column:] -= error.unsqueeze(1) * upper[column, column:]
    lost = rounded - weights
    return float((lost @ true * lost).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("texts", [8, 16, 32])
def test_few_texts_are_believed_less(texts: int, seed: int) -> None:
    """Rounding costs less on other texts than with damping alone."""
    true, found = estimate(64, texts, seed)
    shrunk = Regularization(4 / texts, (0.01,))
    assert charge(true, found, shrunk) < 0.95 * charge(true, found, PLAIN)


def test_one_massive_input_does_not_drown_the_others() -> None:
    """An activation of a first token, in one input: shares are of what the other inputs have."""
    torch.manual_seed(0)
    turned = torch.linalg.qr(torch.randn(64, 64))[0]
    true = turned @ torch.diag(torch.logspace(0, -3, 64)) @ turned.T
    found = true.clone()
    found[5, 5] += 640 * 64 * float(true.diagonal().median())  # as in a down_proj of SmolLM2-135M
    assert charge(true, found, Regularization(1e-6, (0.01,))) < 0.5 * charge(true, found, PLAIN)


def test_inputs_over_tokens(tmp_path: Any) -> None:
    """All calibration tokens reach a dense module; of an expert those that were routed to it count."""
    checkpoint = LayerCheckpoint(tmp_path, torch.float32)
    record = SolverRecord(checkpoint, None, (), (0.01, 0.1), frozenset(), tokens=1000, shrinkage=4.0)  # type: ignore[arg-type]
    assert record.regularization(500) == Regularization(2.0, (0.01, 0.1))
    assert record.regularization(500, 4000) == Regularization(0.5, (0.01, 0.1))
