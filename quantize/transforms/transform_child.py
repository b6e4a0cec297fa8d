"""The child that writes a transformed base, `python -m quantize.transforms.transform_child`.

The result is a model directory like the base: config, tokenizer and weights. Matrices that will be quantized are in
fp32, so that nothing is rounded before the solver rounds it; all other tensors have the base's dtypes.
"""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize.model_files.kept_files import kept_files
from quantize.model_files.safetensors_header import StoredTensor
from quantize.model_files.weight_files import stored_tensors
from quantize.planning.block_form import BLOCK_FORMS
from quantize.running.worker import WorkerChannel, run_child
from quantize.schemes.module_config import WeightArgs
from quantize.transforms.activations import read_activations
from quantize.transforms.layout import EMBEDDINGS, Layout
from quantize.transforms.rotation import rotated, rotation_of
from quantize.transforms.smoothing import Rounding, ScaleGroup, best_scales, groups_of, smoothed
from quantize.variants.checkpoint import write_json, write_shards
from quantize.variants.weights import lazy_tensors


def transform(job: dict[str, Any], channel: WorkerChannel) -> dict[str, Any]:
    """Child's work: `{base, transforms, seed, samples, roundings, scratch, into}` -> a model directory in `into`.

    `roundings` maps each linear layer of the base's files to `[bits, group size, activation bits]`, bits 0 for a layer
    that is kept. Experts are left out: no transform changes them.
    """
    base, names = Path(job["base"]), frozenset(job["transforms"])
    into = Path(job["into"])
    config = json.loads((base / "config.json").read_bytes())
    layout = Layout.of(config, stored=lazy_tensors(base).keys())
    roundings = {name: rounding_of(*numbers) for name, numbers in job["roundings"].items()}
    quantized = frozenset(f"{name}.weight" for name, one in roundings.items() if one.weights is not None)
    if names & {"rotate-r1", "rotate-r2"}:
        target = Path(job["scratch"]) if "smooth" in names else into
        rotation = rotation_of(layout, residual="rotate-r1" in names, heads="rotate-r2" in names, seed=job["seed"])
        write_model(base, rotated(lazy_tensors(base), layout, rotation), quantized, target)
        if "rotate-r1" in names:
            write_json(target / "config.json", {**config, "tie_word_embeddings": False})
        base = target
    if "smooth" in names:
        form = BLOCK_FORMS[config["model_type"]]
        groups = [group for layer in range(layout.layers) for group in groups_of(layer, layout, form)]
        scales = search_scales(base, groups, job["samples"], roundings, channel)
        write_model(base, smoothed(lazy_tensors(base), groups, scales), quantized, into)
    return {}


def rounding_of(bits: int, group_size: int, activation_bits: int) -> Rounding:
    """Read one row of the job's roundings."""
    return Rounding(WeightArgs(bits, group_size) if bits else None, activation_bits)


def search_scales(
    base: Path,
    groups: Sequence[ScaleGroup],
    samples: list[list[int]],
    roundings: Mapping[str, Rounding],
    channel: WorkerChannel,
) -> dict[str, Any]:
    """Search the scales of all groups of layers, by their source, on what the layers read of the samples."""
    import torch  # noqa: PLC0415

    tensors = lazy_tensors(base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scales = {}
    with torch.inference_mode():
        activations = read_activations(base, samples, [group.layers[0] for group in groups])
        for done, group in enumerate(groups, 1):
            read = activations.pop(group.layers[0]).to(device)
            weights = {name: tensors[f"{name}.weight"][...].to(device).float() for name in group.layers}
            scales[group.source] = best_scales(group, read, weights, roundings).cpu()
            channel.progress(done, len(groups))
    return scales


def write_model(base: Path, tensors: Iterable[tuple[str, Any]], quantized: frozenset[str], into: Path) -> None:
    """Write a model directory with these tensors; config and tokenizer are the base's."""
    into.mkdir(parents=True, exist_ok=True)
    write_shards(_stored(tensors, stored_tensors(base), quantized), into)
    for file in (base / "config.json", *kept_files(base)):
        shutil.copyfile(file, into / file.name)


def _stored(
    tensors: Iterable[tuple[str, Any]], base: Mapping[str, StoredTensor], quantized: frozenset[str]
) -> Iterator[tuple[str, Any]]:
    """Give each tensor the dtype that it will have in the file; a new output matrix has that of the embeddings."""
    import torch  # noqa: PLC0415

    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    for name, tensor in tensors:
        stored = base.get(name) or base[EMBEDDINGS]
        yield name, (tensor if name in quantized else tensor.to(dtypes[stored.dtype])).contiguous()


if __name__ == "__main__":
    sys.exit(run_child(transform))
