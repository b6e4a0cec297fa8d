"""Memory: how much it takes is arithmetic, how much there is the kernel tells."""

from dataclasses import replace
from pathlib import Path

import pytest

from quantize.base import BaseModel, read_base
from quantize.errors import MachineError, UsageError
from quantize.running.memory import needed_bytes, require_memory, widest_inputs
from tests.quantize.models import write_hollow_model

GIGA = 10**9


def base(directory: Path, dtype: str = "bf16") -> BaseModel:
    """A base of QwQ-32B's shape."""
    sizes = {"hidden_size": 5120, "intermediate_size": 27648}
    read = read_base(write_hollow_model(directory / "base", **sizes))
    shapes = {"model.layers.0.mlp.down_proj": (5120, 27648), "model.layers.0.mlp.up_proj": (27648, 5120)}
    return replace(read, bytes=65 * GIGA, shapes=shapes, dtype=dtype)


@pytest.mark.parametrize(
    "dtype,tokens,gpu,gigabytes",
    [
        # Twice the file, three matrices of 27648 x 27648 in fp32 (3.06 GB each), and 1 GB for the libraries.
        ("bf16", 0, False, 130 + 9.17 + 1),
        ("fp32", 0, False, 65 + 9.17 + 1),
        # 128 x 2048 tokens of 5120 fp32 numbers, in and out.
        ("bf16", 128 * 2048, False, 130 + 9.17 + 10.74 + 1),
        ("bf16", 128 * 2048, True, 66),
    ],
)
def test_what_it_takes(tmp_path: Path, dtype: str, tokens: int, gpu: bool, gigabytes: float) -> None:
    """On a CPU the weights grow to fp32; with a GPU they only pass through."""
    needed = needed_bytes(base(tmp_path, dtype=dtype), tokens, gpu=gpu)
    assert needed / GIGA == pytest.approx(gigabytes, abs=0.01)


def test_the_widest_layer_sets_the_size_of_the_hessian(tmp_path: Path) -> None:
    """It is the one with the most inputs."""
    assert widest_inputs(base(tmp_path)) == 27648


def test_too_little_is_told_with_both_numbers() -> None:
    """In one line, as a usage error."""
    require_memory(5 * GIGA, 5 * GIGA, what="x")
    with pytest.raises(
        MachineError, match=r"too little memory for x: about 6.0 GB needed, 5.0 GB available; free"
    ) as told:
        require_memory(6 * GIGA, 5 * GIGA, what="x")
    assert isinstance(told.value, UsageError)
