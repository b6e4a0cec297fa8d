"""How much memory quantizing takes, and how much there is."""

from config.memory import read_memory
from quantize.base import BaseModel
from quantize.errors import MachineError

_FP32_BYTES = 4
# Bytes of a weight as it is computed with on a CPU (fp32), over its bytes in the file.
_GROWTH = {"bf16": 2, "fp16": 2, "fp32": 1}
# A Hessian, the copy that is damped and factored, and its inverse.
_MATRICES = 3
# What a layer's inputs and outputs of all samples are kept in.
_COPIES = 2
_PYTHON_BYTES = 10**9
_GIGA = 1e9


def needed_bytes(base: BaseModel, tokens: int, *, gpu: bool) -> int:
    """Estimate the main memory that quantizing on `tokens` tokens takes at its peak.

    On a CPU: all weights in fp32, the Hessian of the widest layer, what one layer passes to the next for all tokens,
    and the libraries. With a GPU the weights wait in main memory as the file has them; the rest lies on the GPU.
    """
    if gpu:
        return base.bytes + _PYTHON_BYTES
    widest = widest_inputs(base)
    hidden = base.sizes.get("hidden size", widest)
    matrices = _MATRICES * widest**2 * _FP32_BYTES
    activations = _COPIES * tokens * hidden * _FP32_BYTES
    return base.bytes * _GROWTH.get(base.dtype, 2) + matrices + activations + _PYTHON_BYTES


def widest_inputs(base: BaseModel) -> int:
    """Inputs of the widest linear layer: its Hessian has that many rows, and wants as many tokens."""
    return max((columns for _, columns in base.shapes.values()), default=0)


def require_memory(needed: int, available: int, *, what: str) -> None:
    """Raise MachineError unless so many bytes are available."""
    if available < needed:
        raise MachineError(
            f"too little memory for {what}: about {needed / _GIGA:.1f} GB needed, {available / _GIGA:.1f} GB "
            "available; free some, take fewer or shorter samples, or use a larger machine",
        )


def available_bytes() -> int:
    """Read how much memory a new process may take: of this machine, or of its container."""
    return read_memory().free_bytes
