"""The child that rounds weights to FP8, `python -m quantize.backends.fp8_child`.

FP8 E4M3 as in arXiv 2209.05433: 448 is the largest number. A scale is the largest weight of its row or block over 448,
as llm-compressor's FP8_DYNAMIC and DeepSeek's block FP8 have it.
"""

import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantize.backends.losses import SolvedModule
from quantize.errors import SolveError
from quantize.modules import LinearLayer, ModuleTree
from quantize.running.worker import WorkerChannel, run_child
from quantize.variants.weights import lazy_tensors

FP8_MAX = 448.0
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_STACKED_DIMENSIONS = 3


def rounded(weight: Any, block: tuple[int, int] | None) -> tuple[Any, Any]:
    """Round [N, K] to FP8 with one scale a row, [N, 1] fp32, or a block of (rows, columns), [N/rows, K/columns]."""
    import torch  # noqa: PLC0415

    weight = weight.float()
    size = block or (1, weight.shape[1])
    largest = _pooled(weight.abs(), size)
    scale = torch.where(largest > 0, largest / FP8_MAX, torch.ones_like(largest))
    return (weight / spread(scale, size, weight.shape)).to(torch.float8_e4m3fn), scale


def spread(scale: Any, size: tuple[int, int], shape: tuple[int, int]) -> Any:
    """Repeat the scale of each block for its weights: [N/rows, K/columns] -> [N, K]."""
    return scale.repeat_interleave(size[0], 0)[: shape[0]].repeat_interleave(size[1], 1)[:, : shape[1]]


def quantize(job: dict[str, Any], channel: WorkerChannel) -> dict[str, Any]:
    """Child's work: `{base, tree, modules, block, into}` -> a file for each module; those that are there are kept."""
    started = time.monotonic()
    tree, into = ModuleTree.from_json(job["tree"]), Path(job["into"])
    tensors, wanted = lazy_tensors(Path(job["base"])), frozenset(job["modules"])
    block = tuple(job["block"]) if job["block"] else None
    layers = [layer for layer in tree.layers if layer.stored_name in wanted]
    solved = []
    first_rows = first_rows_of(tree)
    for done, layer in enumerate(layers, start=1):
        path = into / f"{layer.solver_name}.safetensors"
        if not path.exists():
            weight = weight_of(layer, tensors[layer.tensor][...], first_rows[layer.solver_name])
            _save(path, layer, weight, block)
        solved.append(_solved_module(path, layer, block))
        channel.progress(done, len(layers))
    return {"seconds": round(time.monotonic() - started, 1), "modules": [asdict(module) for module in solved]}


def first_rows_of(tree: ModuleTree) -> dict[str, int]:
    """Return each layer's first row in the matrix that holds it: the sum of the parts before it."""
    rows: dict[tuple[str, int | None], int] = {}
    first: dict[str, int] = {}
    for layer in sorted(tree.layers, key=lambda layer: layer.part or 0):
        place = (layer.tensor, layer.expert)
        first[layer.solver_name] = rows.get(place, 0)
        rows[place] = first[layer.solver_name] + layer.rows
    return first


def weight_of(layer: LinearLayer, tensor: Any, first_row: int) -> Any:
    """Take a layer's [rows, columns] out of the tensor of the base that holds it, alone or with others."""
    if layer.expert is not None and tensor.ndim == _STACKED_DIMENSIONS:
        tensor = tensor[layer.expert]
        if tensor.shape[1] != layer.columns:
            tensor = tensor.t()
    tensor = tensor[first_row : first_row + layer.rows]
    if tuple(tensor.shape) != (layer.rows, layer.columns):
        raise SolveError(f"{layer.tensor}: has shape {tuple(tensor.shape)}, not {(layer.rows, layer.columns)}")
    return tensor


def _save(path: Path, layer: LinearLayer, weight: Any, block: tuple[int, int] | None) -> None:
    import torch  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    if not torch.isfinite(weight).all():
        raise SolveError(f"{layer.tensor}: has NaN or Inf; check the base")
    quantized, scale = rounded(weight, block)
    size = block or (1, layer.columns)
    error = (weight.float() - quantized.float() * spread(scale, size, weight.shape)).square().sum()
    loss = float(error / weight.float().square().sum().clamp(min=1e-30))
    save_file({"weight": quantized, "scale": scale}, path.with_suffix(".partial"), metadata={"loss": json.dumps(loss)})
    path.with_suffix(".partial").rename(path)


def _solved_module(path: Path, layer: LinearLayer, block: tuple[int, int] | None) -> SolvedModule:
    from safetensors import safe_open  # noqa: PLC0415

    with safe_open(path, framework="pt") as file:
        loss = json.loads(file.metadata()["loss"])
    number = _LAYER.search(layer.solver_name)
    return SolvedModule(layer.solver_name, int(number[1]) if number else 0, 8, block[1] if block else -1, loss, 0.0)


def _pooled(weight: Any, size: tuple[int, int]) -> Any:
    """Return the largest of each block: [N, K] -> [N/rows, K/columns], rounded up."""
    import torch  # noqa: PLC0415

    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % size[1], 0, -rows % size[0]))
    blocks = padded.reshape(padded.shape[0] // size[0], size[0], padded.shape[1] // size[1], size[1])
    return blocks.amax(dim=(1, 3))


if __name__ == "__main__":
    sys.exit(run_child(quantize))
