"""How long solving will take and what it will hold in memory: an estimate from shapes and nominal rates. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from config.manifest import Engine
from quantize.base import BaseModel
from quantize.running.memory import needed_bytes
from quantize.schemes.fit import Shapes
from quantize.schemes.module_config import fused_name
from quantize.schemes.settings import SolverSettings

_BLOCK = re.compile(r"^.*?(?:layers|h|blocks)\.\d+\.")
# Layers of a block wait for the quantized ones before them: one pass a stage, and one with the quantized block.
_PASSES_SEQUENTIAL = 5
_PASSES_AT_ONCE = 2
# Tries of a scale, and operations a weight for each.
_SEARCH_OPERATIONS = 1000
_HESSIAN_COPIES = 3
_FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does in a second, nominally: products of a forward pass, of fp32 algebra, simple operations.

    GPTQ visits the input columns of a matrix one after the other; `column_seconds` is what each costs at least.
    """

    description: str
    forward_flops: float
    exact_flops: float
    simple_operations: float
    column_seconds: float


# CPU: measured with a 135M model on one core of a server with AVX-512, times the cores. CUDA: chosen so that the
# 80 s a layer, and 11 s a down_proj, come out that were published for a 32B model on a GPU with 80 GB.
NOMINAL: Mapping[Engine, Rates] = MappingProxyType(
    {
        "cpu": Rates("60 GFLOP/s a core", 60e9, 60e9, 1.4e9, 0.15e-3),
        "cuda": Rates("one data-centre GPU, 100 TFLOP/s", 100e12, 19.5e12, 1e12, 0.3e-3),
    },
)


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """An estimate: seconds for a block and for all, bytes held by the machine and by a GPU (0 without one)."""

    blocks: int
    block_seconds: float
    host_bytes: int
    gpu_bytes: int
    assumed: str

    @property
    def seconds(self) -> float:
        """For all blocks."""
        return self.blocks * self.block_seconds


def estimate_cost(
    base: BaseModel, tokens: int, settings: SolverSettings, engine: Engine, cores: int = 1
) -> CostEstimate:
    """Estimate the solving of a base on `tokens` tokens of calibration text."""
    blocks = blocks_of(base.shapes)
    largest = max(blocks.values(), key=lambda block: sum(map(prod, block.values())))
    workers = cores if engine == "cpu" else 1
    rates = NOMINAL[engine]
    description = rates.description if engine == "cuda" else f"{rates.description}, {cores} cores"
    return CostEstimate(
        blocks=len(blocks),
        block_seconds=_block_seconds(largest, tokens, settings, rates, workers),
        host_bytes=needed_bytes(base, tokens, gpu=engine == "cuda"),
        gpu_bytes=_gpu_bytes(base, largest, tokens) if engine == "cuda" else 0,
        assumed=description,
    )


def blocks_of(shapes: Shapes) -> dict[str, dict[str, tuple[int, int]]]:
    """Sort linear layers by the block they are in."""
    blocks: dict[str, dict[str, tuple[int, int]]] = {}
    for name, shape in shapes.items():
        match = _BLOCK.match(name)
        blocks.setdefault(match[0] if match else "", {})[name] = shape
    return blocks


def _block_seconds(block: Shapes, tokens: int, settings: SolverSettings, rates: Rates, workers: int) -> float:
    weights = sum(map(prod, block.values()))
    inputs = {fused_name(name): columns for name, (_, columns) in block.items()}
    passes = _PASSES_SEQUENTIAL if settings.true_sequential else _PASSES_AT_ONCE
    forward = passes * 2 * tokens * weights / rates.forward_flops
    hessians = sum(2 * tokens * columns**2 + 2 * columns**3 for columns in inputs.values())
    solving = sum(2 * rows * columns**2 for rows, columns in block.values())
    exact = (hessians * (2 if settings.gptaq else 1) + solving) / rates.exact_flops
    search = (
        weights * _SEARCH_OPERATIONS / rates.simple_operations
        if settings.weighted_scales or settings.scale_norm
        else 0.0
    )
    visits = sum(columns for _, columns in block.values()) * rates.column_seconds
    return (forward + exact + search) / workers + visits


def _gpu_bytes(base: BaseModel, block: Shapes, tokens: int) -> int:
    weights = sum(map(prod, block.values()))
    working = max(map(prod, block.values())) * _FP32_BYTES * 2
    return weights * 2 + working + _hessian_bytes(block) + 2 * tokens * _width(base, block) * 2


def _hessian_bytes(block: Shapes) -> int:
    return max(columns for _, columns in block.values()) ** 2 * _FP32_BYTES * _HESSIAN_COPIES


def _width(base: BaseModel, block: Shapes) -> int:
    return base.sizes.get("hidden size") or min(columns for _, columns in block.values())
