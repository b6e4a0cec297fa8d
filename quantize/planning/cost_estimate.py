"""How long solving will take and what it will hold in memory: an estimate from shapes and nominal rates. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Literal

from config.manifest import Engine
from quantize.base import BaseModel
from quantize.planning.model_sizes import sizes_of
from quantize.schemes.fit import Shapes
from quantize.schemes.module_config import fused_name, narrows
from quantize.schemes.settings import SolverSettings

_BLOCK = re.compile(r"^.*?(?:layers|h|blocks)\.\d+\.")
# Layers of a block wait for the quantized ones before them: one pass a stage, and one with the quantized block.
_PASSES_SEQUENTIAL = 5
_PASSES_AT_ONCE = 2
# Tries of a scale, and operations a weight for each.
_SEARCH_OPERATIONS = 300
_HESSIAN_COPIES = 3
_FP32_BYTES = 4
# A weight as it is computed with: fp32 on a CPU, bf16 on a GPU.
_ITEM_BYTES: Mapping[Engine, int] = MappingProxyType({"cpu": 4, "cuda": 2})
# Resident memory of the solver's process after its imports, as measured with torch 2.13 and GPTQModel 7.6.
_SOLVER_LIBRARY_BYTES = 740_000_000
# A child that has imported torch alone; fp32 weights, absolute values, quotients and FP8 of a matrix (a weight).
_TORCH_BYTES = 300_000_000
_ROUNDING_BYTES = 18
_ROUNDED_WEIGHTS_PER_SECOND = 100e6
# fp32 copies of a matrix while it is solved: weights, quantized weights, losses, and those of the block at hand.
_MATRIX_COPIES = 6
# What a layer's inputs and outputs of all samples are kept in.
_ACTIVATION_COPIES = 2
# Residual streams of the unquantized model in a block: its input, and what the MLP's norm reads.
_STREAMS = 2
# CUDA's own context, and what its allocator can't use.
_CUDA_BYTES = 1_500_000_000

# Where GPTAQ keeps the unquantized model's inputs of a layer: on the GPU, in main memory, or nowhere: then it is off.
Placement = Literal["gpu", "host"]


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
    """An estimate: seconds for a block and for all, bytes held by the machine and by a GPU (0 without one).

    `kept_input_bytes` are those of GPTAQ, kept in `kept_inputs`; with `by_layers` the weights that are not at work stay
    on disk.
    """

    blocks: int
    block_seconds: float
    host_bytes: int
    gpu_bytes: int
    assumed: str
    kept_input_bytes: int = 0
    kept_inputs: Placement | None = None
    by_layers: bool = False

    @property
    def seconds(self) -> float:
        """For all blocks."""
        return self.blocks * self.block_seconds


@dataclass(frozen=True, slots=True)
class Room:
    """What a solver may use: bytes of main memory, and of one GPU; None where that isn't known, and not a limit."""

    host_bytes: int | None = None
    gpu_bytes: int | None = None


def rounding_cost(base: BaseModel) -> CostEstimate:
    """Estimate the rounding of all weights to FP8 on one core: one matrix in memory at a time, with its copies."""
    sizes = sizes_of(base)
    largest = max((tensor.bytes for tensor in base.tensors.values()), default=0)
    return CostEstimate(
        blocks=sizes.layers,
        block_seconds=sizes.layer / _ROUNDED_WEIGHTS_PER_SECOND,
        host_bytes=_TORCH_BYTES + largest + sizes.matrix * _ROUNDING_BYTES,
        gpu_bytes=0,
        assumed="one core",
        by_layers=True,
    )


def estimate_cost(
    base: BaseModel, tokens: int, settings: SolverSettings, engine: Engine, cores: int = 1, room: Room | None = None
) -> CostEstimate:
    """Estimate the solving of a base on `tokens` tokens of calibration text, placed in the room that there is.

    The inputs that GPTAQ keeps go to the GPU, or else to main memory; if they fit nowhere, the estimate is the one
    without GPTAQ, and `kept_inputs` is None. Weights stay in memory as long as all of them fit.
    """
    room = room or Room()
    for placement in _placements(settings, engine):
        for by_layers in (False, True):
            cost = _cost(base, tokens, settings, engine, cores, placement, by_layers=by_layers)
            if _fits(cost, room):
                return cost
    without = replace(settings, gptaq=0.0)
    by_layers = not _fits(_cost(base, tokens, without, engine, cores, None, by_layers=False), room)
    return _cost(base, tokens, without, engine, cores, None, by_layers=by_layers)


def _placements(settings: SolverSettings, engine: Engine) -> tuple[Placement, ...]:
    if not settings.gptaq:
        return ()
    return ("gpu", "host") if engine == "cuda" else ("host",)


def _fits(cost: CostEstimate, room: Room) -> bool:
    return (room.host_bytes is None or cost.host_bytes <= room.host_bytes) and (
        room.gpu_bytes is None or cost.gpu_bytes <= room.gpu_bytes
    )


def _cost(
    base: BaseModel,
    tokens: int,
    settings: SolverSettings,
    engine: Engine,
    cores: int,
    kept_inputs: Placement | None,
    *,
    by_layers: bool,
) -> CostEstimate:
    blocks = blocks_of(base.shapes)
    largest = max(blocks.values(), key=lambda block: sum(map(prod, block.values())))
    sizes = sizes_of(base)
    workers = cores if engine == "cpu" else 1
    rates = NOMINAL[engine]
    kept = kept_input_bytes(largest, tokens, engine, kept_inputs) if kept_inputs else 0
    if kept and settings.residual:
        kept += _STREAMS * tokens * sizes.hidden * _ITEM_BYTES[engine]
    solving = _solving_bytes(largest)
    activations = _ACTIVATION_COPIES * tokens * sizes.hidden * _ITEM_BYTES[engine]
    weights = (sizes.outer + 2 * sizes.layer if by_layers else sizes.parameters) * _ITEM_BYTES[engine]
    on_cpu = engine == "cpu"
    return CostEstimate(
        blocks=len(blocks),
        block_seconds=_block_seconds(largest, tokens, settings, rates, workers),
        host_bytes=_SOLVER_LIBRARY_BYTES
        + weights
        + activations
        + (kept if kept_inputs == "host" else 0)
        + (solving if on_cpu else 0),
        gpu_bytes=0
        if on_cpu
        else _CUDA_BYTES + sizes.layer * 2 + solving + activations + (kept if kept_inputs == "gpu" else 0),
        assumed=rates.description if engine == "cuda" else f"{rates.description}, {cores} cores",
        kept_input_bytes=kept,
        kept_inputs=kept_inputs,
        by_layers=by_layers,
    )


def kept_input_bytes(block: Shapes, tokens: int, engine: Engine, placement: Placement) -> int:
    """Bytes that GPTAQ keeps of a block's linear layers for all tokens: inputs, or outputs of layers that narrow.

    Layers that read the same tensor share it where it was computed; what moves to main memory is copied for each.
    """
    kept = {name: rows if narrows(name, rows, columns) else columns for name, (rows, columns) in block.items()}
    shared = {fused_name(name): width for name, width in kept.items()}
    copied = engine == "cuda" and placement == "host"
    return tokens * sum(kept.values() if copied else shared.values()) * _ITEM_BYTES[engine]


def _solving_bytes(block: Shapes) -> int:
    return max(
        _HESSIAN_COPIES * columns**2 * _FP32_BYTES + _MATRIX_COPIES * rows * columns * _FP32_BYTES
        for rows, columns in block.values()
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
