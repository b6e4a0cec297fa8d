"""Packed integers <-> dense tensors, and a quantized directory as the dense tensors it stands for.

GPTQ format 1 (AutoGPTQ's): per linear layer with K inputs and N outputs, `qweight` int32 [K*bits/32, N] holds the
integers of 32/bits consecutive inputs, lowest bits first; `qzeros` int32 [G, N*bits/32] holds the zero points of
32/bits consecutive outputs, each less one; `scales` fp16 [G, N]; `g_idx` int32 [K] names each input's group.
Compressed-tensors `int-quantized`: `weight` int8 [N, K] and `weight_scale` [N, 1]; `pack-quantized` (llm-compressor's
W4A16 and W8A16): `weight_packed` int32 [N, K*bits/32] holds integers plus 2^(bits-1), lowest bits first, `weight_scale`
is [N, G], `weight_shape` says N and K, and an asymmetric one has `weight_zero_point` int32 [N*bits/32, G].
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from config.manifest import Scheme
from quantize.errors import VariantError
from quantize.model_files.weight_files import weight_files

Tensors = dict[str, Any]

_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Packing:
    """How a quantized directory stores its linear layers."""

    format: str
    bits: int
    activation_bits: int


def unpack_rows(words: Any, bits: int) -> Any:
    """[K*bits/32, N] int32 words -> [K, N] int32 values of `bits` bits, packed along the first axis."""
    import torch  # noqa: PLC0415

    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32).view(1, -1, 1)
    return ((words.unsqueeze(1) >> shifts) & ((1 << bits) - 1)).reshape(-1, words.shape[1])


def unpack_columns(words: Any, bits: int) -> Any:
    """[G, N*bits/32] int32 words -> [G, N] int32 values of `bits` bits, packed along the second axis."""
    return unpack_rows(words.t().contiguous(), bits).t()


def stored_bits(layer: Mapping[str, Any]) -> int:
    """Tell a GPTQ layer's bits from its own shapes: overrides may give each layer others."""
    return int(layer["qweight"].shape[0]) * _WORD_BITS // int(layer["g_idx"].shape[0])


def gptq_integers(layer: Mapping[str, Any], bits: int) -> Any:
    """One GPTQ layer -> [K, N] int32 signed integers: stored value less its group's zero point."""
    zeros = (unpack_columns(layer["qzeros"], bits) + 1) & ((1 << bits) - 1)
    return unpack_rows(layer["qweight"], bits) - zeros[layer["g_idx"].long()]


def gptq_dense(layer: Mapping[str, Any], bits: int) -> Any:
    """One GPTQ layer -> the dense [N, K] fp32 weight it stands for."""
    scales = layer["scales"].float()[layer["g_idx"].long()]
    return (gptq_integers(layer, bits).float() * scales).t().contiguous()


def gptq_to_int8(layer: Mapping[str, Any]) -> tuple[Any, Any]:
    """One per-channel 8-bit GPTQ layer -> `weight` int8 [N, K] and `weight_scale` fp32 [N, 1]."""
    import torch  # noqa: PLC0415

    integers = gptq_integers(layer, bits=8)
    return integers.t().contiguous().to(torch.int8), layer["scales"].float().t().contiguous()


def int8_dense(layer: Mapping[str, Any]) -> Any:
    """One compressed-tensors layer -> the dense [N, K] fp32 weight it stands for."""
    return layer["weight"].float() * layer["weight_scale"].float()


def pack_quantized_dense(layer: Mapping[str, Any]) -> Any:
    """One compressed-tensors layer of packed words -> the dense [N, K] fp32 weight it stands for."""
    import torch  # noqa: PLC0415

    words, scale = layer["weight_packed"], layer["weight_scale"].float()
    outputs, inputs = layer["weight_shape"].tolist()
    bits = words.shape[1] * _WORD_BITS // inputs
    group = torch.arange(inputs) // -(-inputs // scale.shape[1])
    zeros = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.int32)
    if "weight_zero_point" in layer:
        zeros = unpack_rows(layer["weight_zero_point"], bits)[:outputs]
    stored = unpack_columns(words, bits)[:, :inputs]
    return (stored - zeros[:, group]).float() * scale[:, group]


def read_packing(directory: Path) -> Packing:
    """Read how a directory is quantized from its config.json; VariantError for what can't be read back."""
    try:
        quantization_config = json.loads((directory / "config.json").read_bytes())["quantization_config"]
    except (OSError, ValueError, KeyError):
        raise VariantError(f"{directory}: has no config.json with a quantization_config; is it a variant?") from None
    method = quantization_config.get("quant_method")
    if method == "gptq" and quantization_config.get("bits") in (4, 8):
        return Packing("gptq", quantization_config["bits"], 16)
    if method == "compressed-tensors" and quantization_config.get("format") == "int-quantized":
        return Packing("compressed-tensors", 8, 8)
    if method == "compressed-tensors" and quantization_config.get("format") == "pack-quantized":
        every = {group["weights"]["num_bits"] for group in quantization_config["config_groups"].values()}
        if every <= {4, 8}:
            return Packing("pack-quantized", min(every), 16)
    what = (
        quantization_config.get("format")
        if method == "compressed-tensors"
        else f"{quantization_config.get('bits')} bits"
    )
    raise VariantError(
        f"{directory}: {method} with {what} can't be read back; GPTQ and pack-quantized of 4 or 8 bits, and w8a8, can"
    )


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that `tensor[...]` reads from its file, and unpacks; transformers' loader takes it for a slice."""

    read: Callable[[], Any]

    def __getitem__(self, _: Any) -> Any:
        """Read the whole tensor."""
        return self.read()


def lazy_tensors(directory: Path) -> dict[str, LazyTensor]:
    """Map the names of all tensors of a directory's safetensors files to readers, by file and name."""
    from safetensors import safe_open  # noqa: PLC0415

    tensors: dict[str, LazyTensor] = {}
    for file in weight_files(directory):
        stream: Any = safe_open(file, framework="pt", backend="pread")
        tensors |= {name: LazyTensor(partial(stream.get_tensor, name)) for name in sorted(stream.keys())}
    return tensors


def lazy_dense(directory: Path) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Map the tensors of a quantized directory, by their base's names, to readers of dense tensors; name its layers."""
    packing = read_packing(directory)
    tensors = lazy_tensors(directory)
    marker, parts = _PARTS[packing.format]
    layers = tuple(sorted(name.removesuffix(f".{marker}") for name in tensors if name.endswith(f".{marker}")))
    for layer in layers:
        packed = {part: tensors.pop(f"{layer}.{part}") for part in parts if f"{layer}.{part}" in tensors}
        tensors[f"{layer}.weight"] = LazyTensor(partial(_dense, packed, packing.format))
    return tensors, layers


def read_dense(directory: Path) -> tuple[Tensors, tuple[str, ...]]:
    """Read a quantized directory as dense tensors by their base's names, and the names of its quantized layers."""
    tensors, layers = lazy_dense(directory)
    return {name: tensor[...] for name, tensor in tensors.items()}, layers


def read_tensors(directory: Path) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of all safetensors files of a directory, one by one."""
    for name, tensor in lazy_tensors(directory).items():
        yield name, tensor[...]


def _dense(packed: Mapping[str, LazyTensor], form: str) -> Any:
    return _DENSE[form]({part: tensor[...] for part, tensor in packed.items()})


_PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "gptq": ("qweight", ("qweight", "qzeros", "scales", "g_idx")),
    "compressed-tensors": ("weight_scale", ("weight", "weight_scale")),
    "pack-quantized": ("weight_packed", ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")),
}
_DENSE: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "gptq": lambda layer: gptq_dense(layer, stored_bits(layer)),
    "compressed-tensors": int8_dense,
    "pack-quantized": pack_quantized_dense,
}


def packed_module(tensors: Mapping[str, Any], layers: Sequence[str], module: str, scheme: Scheme) -> Tensors:
    """Give the GPTQ tensors of `layers`, stacked, as those of `module` in a variant of `scheme`."""
    packed = _stacked([{part: tensors[f"{layer}.{part}"][...] for part in _PARTS["gptq"][1]} for layer in layers])
    if scheme.format == "gptq":
        return {f"{module}.{part}": tensor.contiguous() for part, tensor in packed.items()}
    weight, scale = gptq_to_int8(packed)
    return {f"{module}.weight": weight, f"{module}.weight_scale": scale}


def _stacked(layers: Sequence[Tensors]) -> Tensors:
    """Stack GPTQ layers with the same inputs: all parts have the outputs on their last axis, and share `g_idx` [K]."""
    import torch  # noqa: PLC0415

    if len(layers) == 1:
        return layers[0]
    if any(not torch.equal(layer["g_idx"], layers[0]["g_idx"]) for layer in layers):
        raise VariantError("layers that share a matrix have different groups, and can't be stored in it")
    parts = {part: torch.cat([layer[part] for layer in layers], dim=1) for part in ("qweight", "qzeros", "scales")}
    return {**parts, "g_idx": layers[0]["g_idx"]}


def with_base_matrices(tensors: Mapping[str, LazyTensor], base: Iterable[str]) -> dict[str, LazyTensor]:
    """Put dense layers that are stored one by one back into the base's matrices where it has those.

    All experts of a block [E, N, K], or gate above up [N, K].
    """
    result = dict(tensors)
    for name in base:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        parts = _STACKED_PARTS.get(leaf)
        if name in result or parts is None:
            continue
        if f"{parent}.{parts[0]}.weight" in result:
            result[name] = LazyTensor(partial(_join, [result.pop(f"{parent}.{part}.weight") for part in parts]))
            continue
        experts: list[list[LazyTensor]] = []
        while f"{parent}.{len(experts)}.{parts[0]}.weight" in result:
            experts.append([result.pop(f"{parent}.{len(experts)}.{part}.weight") for part in parts])
        if experts:
            result[name] = LazyTensor(partial(_stack_experts, experts))
    return result


def _join(parts: Sequence[LazyTensor]) -> Any:
    import torch  # noqa: PLC0415

    return torch.cat([part[...] for part in parts])


def _stack_experts(experts: Sequence[Sequence[LazyTensor]]) -> Any:
    import torch  # noqa: PLC0415

    return torch.stack([_join(parts) for parts in experts])


_STACKED_PARTS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
