"""Base + solved integers -> the variant's files: the base's own tensors and words, its linear layers replaced."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from config.manifest import Scheme
from config.quantization import QuantizationArgs
from quantize.errors import SolveError
from quantize.model_files.directory_rules import portable_config
from quantize.model_files.kept_files import kept_files
from quantize.model_files.safetensors_header import StoredTensor
from quantize.model_files.weight_files import INDEX_FILE, WHOLE_FILE, stored_tensors
from quantize.modules import ModuleTree, is_expert
from quantize.schemes.makers import is_data_free
from quantize.schemes.module_config import dynamic_rules, patterns_of, quantization_args, weight_args_of
from quantize.variants.weights import LazyTensor, Tensors, packed_module, read_tensors

_SHARD_BYTES = 4_000_000_000
_UNNAMED = ".shard"


def write_checkpoint(
    base: Path,
    packed: Mapping[str, LazyTensor],
    scheme: Scheme,
    damp: float,
    into: Path,
    tree: ModuleTree,
    cache_scales: Mapping[str, float] | None = None,
) -> None:
    """Write a variant of `base` from the tensors of its quantized modules; all other tensors are the base's.

    `cache_scales` are those of an FP8 KV cache, by their names.
    """
    scales = _scale_tensors(cache_scales or {})
    write_shards(chain(_variant_tensors(base, packed, scheme, tree), scales), into)
    _write_configs(base, scheme, damp, into, tree)
    for file in kept_files(base):
        shutil.copyfile(file, into / file.name)


def quantization_config(
    scheme: Scheme, damp: float, layers: Sequence[str], others: Sequence[str] = ()
) -> dict[str, Any]:
    """Say in config.json how to read the weights, in the words of AutoGPTQ or of compressed-tensors 0.17.

    `layers` are all linear layers of the base that the scheme could be about, `others` those that it never is.
    """
    if scheme.compression != "gptq":
        kept = [layer for layer in layers if weight_args_of(layer, scheme) is None]
        ignored = _ignored(kept, layers) + list(others)
        return (
            _fp8_config(scheme, ignored) if scheme.compression == "fp8" else _compressed_config(scheme, layers, ignored)
        )
    dynamic = dynamic_rules(scheme, layers)
    return {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.sym,
        "desc_act": scheme.desc_act,
        "damp_percent": damp,
        "true_sequential": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
    }


def other_layers(tensors: Mapping[str, StoredTensor], tree: ModuleTree) -> list[str]:
    """Name the matrices that are never quantized: routers, linear attention, vision towers; no embeddings, no lm_head.

    An engine takes any linear layer for a quantized one that `ignore` doesn't name.
    """
    return sorted(
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight")
        and len(tensor.shape) > 1
        and name not in tree.stored_in
        and name != "lm_head.weight"
        and "embed" not in name.split(".")[-2]
    )


def _ignored(kept: Sequence[str], layers: Sequence[str]) -> list[str]:
    """Name all experts by one pattern where all are kept: there are tens of thousands."""
    experts = {name for name in layers if is_expert(name)}
    if not experts or not experts.issubset(kept):
        return list(kept)
    return [*(name for name in kept if name not in experts), r"re:.*\.experts\.\d+\..*"]


def _compressed_config(scheme: Scheme, layers: Sequence[str], kept: Sequence[str]) -> dict[str, Any]:
    """Describe all linear layers as one group, and modules with other numbers by their names, which go before it."""
    groups: dict[QuantizationArgs, list[str]] = {scheme.weights: ["Linear"]}
    for pattern, weight_args in patterns_of(scheme, {layer: weight_args_of(layer, scheme) for layer in layers}):
        if weight_args is not None:
            weights = quantization_args(weight_args, zero_points=not scheme.sym)
            groups.setdefault(weights, []).append(f"re:{pattern}")
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.compression,
        "quantization_status": "compressed",
        "ignore": ["lm_head", *kept],
        "kv_cache_scheme": _written_args(scheme.kv_cache) if scheme.kv_cache else None,
        "config_groups": {
            f"group_{number}": _config_group(targets, weights, scheme.input_activations)
            for number, (weights, targets) in enumerate(groups.items())
        },
    }


def _config_group(targets: Sequence[str], weights: QuantizationArgs, inputs: QuantizationArgs | None) -> dict[str, Any]:
    return {
        "targets": list(targets),
        "weights": _written_args(weights),
        "input_activations": _written_args(inputs) if inputs else None,
        "output_activations": None,
    }


def _written_args(args: QuantizationArgs) -> dict[str, Any]:
    return {
        "num_bits": args.num_bits,
        "type": args.type,
        "symmetric": args.symmetric,
        "strategy": args.strategy,
        **({} if args.group_size is None else {"group_size": args.group_size}),
        "dynamic": args.dynamic,
    }


def _fp8_config(scheme: Scheme, kept: Sequence[str]) -> dict[str, Any]:
    """Describe block FP8 as DeepSeek and Qwen do, which transformers reads, too (FineGrainedFP8Config)."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(scheme.weights.block_structure or ()),
        "modules_to_not_convert": ["lm_head", *kept],
    }


def _variant_tensors(
    base: Path, packed: Mapping[str, LazyTensor], scheme: Scheme, tree: ModuleTree
) -> Iterator[tuple[str, Any]]:
    marker = ".scale" if is_data_free(scheme) else ".qweight"
    missing = {name.removesuffix(marker) for name in packed if name.endswith(marker)}
    for name, tensor in read_tensors(base):
        solved = False
        for module in tree.stored_in.get(name, ()):
            members = [layer.solver_name for layer in tree.members[module]]
            if missing.issuperset(members):
                solved = True
                missing.difference_update(members)
                yield from packed_module(packed, members, module, scheme).items()
        if not solved:
            yield name, tensor
    if missing:
        raise SolveError(f"{min(missing)} was solved, and {base} has no weight for it; is a shard missing?")


def _scale_tensors(scales: Mapping[str, float]) -> Iterator[tuple[str, Any]]:
    import torch  # noqa: PLC0415

    for name, scale in scales.items():
        yield name, torch.tensor([scale], dtype=torch.float32)


def write_shards(tensors: Iterable[tuple[str, Any]], into: Path, shard_bytes: int = _SHARD_BYTES) -> None:
    """Write tensors as safetensors files of at most `shard_bytes`, with an index if there are several.

    One file's tensors are in memory at a time. Their names say how many files there are, so they get them at the end.
    """
    weight_map: list[list[str]] = []
    total_bytes = 0
    for number, shard in enumerate(_shards(tensors, shard_bytes)):
        _save(shard, into / f"{_UNNAMED}-{number}")
        weight_map.append(sorted(shard))
        total_bytes += _bytes_of(shard)
        shard.clear()  # gives its memory back before the next is collected
    names = [f"model-{number:05d}-of-{len(weight_map):05d}.safetensors" for number in range(1, len(weight_map) + 1)]
    if len(names) == 1:
        names = [WHOLE_FILE]
    for number, name in enumerate(names):
        (into / f"{_UNNAMED}-{number}").rename(into / name)
    if len(names) > 1:
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {tensor: name for name, shard in zip(names, weight_map, strict=True) for tensor in shard},
        }
        write_json(into / INDEX_FILE, index)


def _shards(tensors: Iterable[tuple[str, Any]], shard_bytes: int) -> Iterator[Tensors]:
    """Collect tensors until a file is full; one that is larger than a file has its own."""
    shard: Tensors = {}
    for name, tensor in tensors:
        if shard and _bytes_of(shard) + tensor.nbytes > shard_bytes:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _save(tensors: Tensors, path: Path) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415

    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it private; the server may run as another user


def _write_configs(base: Path, scheme: Scheme, damp: float, into: Path, tree: ModuleTree) -> None:
    others = other_layers(stored_tensors(base), tree)
    quantization = quantization_config(scheme, damp, sorted(tree.shapes), others)
    config = json.loads((base / "config.json").read_bytes())
    write_json(into / "config.json", {**portable_config(config), "quantization_config": quantization})
    if scheme.format == "gptq":
        write_json(into / "quantize_config.json", quantization)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file the same way every time."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _bytes_of(tensors: Tensors) -> int:
    return sum(int(tensor.nbytes) for tensor in tensors.values())
