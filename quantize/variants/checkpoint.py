"""Base + solved integers -> the variant's files: the base's own tensors and words, its linear layers replaced."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from config.manifest import Scheme
from quantize.errors import SolveError
from quantize.model_files.directory_rules import portable_config
from quantize.model_files.kept_files import kept_files
from quantize.model_files.safetensors_header import StoredTensor
from quantize.model_files.weight_files import INDEX_FILE, WHOLE_FILE, stored_tensors
from quantize.modules import ModuleTree, is_expert
from quantize.schemes.module_config import dynamic_rules, weight_args_of
from quantize.variants.weights import Tensors, packed_module, read_tensors

_SHARD_BYTES = 4_000_000_000


def write_checkpoint(base: Path, solved: Path, scheme: Scheme, damp: float, into: Path, tree: ModuleTree) -> None:
    """Write a variant of `base` from a directory of GPTQ tensors; nothing else of that directory is taken over."""
    packed = dict(read_tensors(solved))
    write_shards(_variant_tensors(base, packed, scheme, tree), into)
    _write_configs(base, scheme, damp, into, tree)
    for file in kept_files(base):
        shutil.copyfile(file, into / file.name)


def quantization_config(
    scheme: Scheme, damp: float, layers: Sequence[str], others: Sequence[str] = ()
) -> dict[str, Any]:
    """Say in config.json how to read the weights, in the words of AutoGPTQ or of compressed-tensors 0.17.

    `layers` are all linear layers of the base that the scheme could be about, `others` those that it never is.
    """
    if scheme.format == "compressed-tensors":
        kept = [layer for layer in layers if weight_args_of(layer, scheme) is None]
        return _compressed_tensors_config(_ignored(kept, layers) + list(others))
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


def _compressed_tensors_config(kept: Sequence[str]) -> dict[str, Any]:
    number = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *kept],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**number, "strategy": "channel", "dynamic": False},
                "input_activations": {**number, "strategy": "token", "dynamic": True},
                "output_activations": None,
            },
        },
    }


def _variant_tensors(
    base: Path, packed: Mapping[str, Any], scheme: Scheme, tree: ModuleTree
) -> Iterator[tuple[str, Any]]:
    missing = {name.removesuffix(".qweight") for name in packed if name.endswith(".qweight")}
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


def write_shards(tensors: Iterator[tuple[str, Any]], into: Path) -> None:
    """Write tensors as safetensors files of at most 4 GB, with an index if there are several."""
    shards: list[Tensors] = [{}]
    for name, tensor in tensors:
        if shards[-1] and _bytes_of(shards[-1]) + tensor.nbytes > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        _save(shards[0], into / WHOLE_FILE)
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _save(shard, into / name)
    index = {
        "metadata": {"total_size": sum(map(_bytes_of, shards))},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in sorted(shard)},
    }
    write_json(into / INDEX_FILE, index)


def _save(tensors: Tensors, path: Path) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415

    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it private; whoever serves may be somebody else


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
