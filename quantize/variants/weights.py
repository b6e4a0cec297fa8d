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
from typing import Any, Literal

from config.manifest import Scheme
from config.quantization import UNQUANTIZED_BITS, Compression, schemes_of
from quantize.errors import VariantError
from quantize.model_files.weight_files import weight_files
from quantize.schemes.makers import is_data_free
from quantize.schemes.module_config import is_symmetric, weight_args_of
from quantize.variants.bit_packing import WORD_BITS, pack_columns, pack_rows, unpack_columns, unpack_rows
from quantize.variants.storage_format import quantized_layers

Tensors = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Packing:
    """How a quantized directory stores its linear layers, and how their inputs are rounded.

    `activation_group` inputs of a token share a scale; -1: all of them.
    """

    format: Compression
    bits: int
    activation_bits: int
    activation_type: Literal["int", "float"] = "int"
    activation_group: int = -1


def stored_bits(layer: Mapping[str, Any]) -> int:
    """Tell a GPTQ layer's bits from its own shapes: overrides may give each layer others."""
    return int(layer["qweight"].shape[0]) * WORD_BITS // int(layer["g_idx"].shape[0])


def gptq_zeros(layer: Mapping[str, Any], bits: int) -> Any:
    """One GPTQ layer -> the zero points [G, N] int32 of its groups."""
    return (unpack_columns(layer["qzeros"], bits) + 1) & ((1 << bits) - 1)


def gptq_integers(layer: Mapping[str, Any], bits: int) -> Any:
    """One GPTQ layer -> [K, N] int32 signed integers: stored value less its group's zero point."""
    return unpack_rows(layer["qweight"], bits) - gptq_zeros(layer, bits)[layer["g_idx"].long()]


def gptq_dense(layer: Mapping[str, Any], bits: int) -> Any:
    """One GPTQ layer -> the dense [N, K] fp32 weight it stands for."""
    scales = layer["scales"].float()[layer["g_idx"].long()]
    return (gptq_integers(layer, bits).float() * scales).t().contiguous()


def gptq_to_int8(layer: Mapping[str, Any]) -> tuple[Any, Any]:
    """One per-channel 8-bit GPTQ layer -> `weight` int8 [N, K] and `weight_scale` fp32 [N, 1]."""
    import torch  # noqa: PLC0415

    integers = gptq_integers(layer, bits=8)
    return integers.t().contiguous().to(torch.int8), layer["scales"].float().t().contiguous()


def gptq_to_pack_quantized(layer: Mapping[str, Any], bits: int, *, symmetric: bool = False) -> Tensors:
    """One GPTQ layer of consecutive groups -> the parts of a `pack-quantized` layer, with equal weights.

    A symmetric one has no zero points: half of the range stands for zero.
    """
    import torch  # noqa: PLC0415

    stored = unpack_rows(layer["qweight"], bits).t()
    zeros = {} if symmetric else {"weight_zero_point": pack_rows(gptq_zeros(layer, bits).t(), bits).contiguous()}
    return {
        "weight_packed": pack_columns(stored, bits).contiguous(),
        "weight_scale": layer["scales"].t().contiguous(),
        **zeros,
        "weight_shape": torch.tensor(stored.shape, dtype=torch.int64),
    }


def int8_dense(layer: Mapping[str, Any]) -> Any:
    """One compressed-tensors layer -> the dense [N, K] fp32 weight it stands for."""
    return layer["weight"].float() * layer["weight_scale"].float()


def fp8_dense(layer: Mapping[str, Any]) -> Any:
    """One FP8 layer -> the dense [N, K] fp32 weight; scales are of the matrix, of rows [N, 1], or of blocks of 128."""
    weight = layer["weight"].float()
    scale = layer["weight_scale_inv" if "weight_scale_inv" in layer else "weight_scale"].float()
    if scale.ndim < weight.ndim or scale.shape[0] == weight.shape[0]:
        return weight * (scale.reshape(-1, 1) if scale.ndim == 1 and scale.numel() > 1 else scale)
    rows, columns = (
        1 << (-(-size // count) - 1).bit_length() for size, count in zip(weight.shape, scale.shape, strict=True)
    )
    spread = scale.repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)
    return weight * spread[:, : weight.shape[1]]


def pack_quantized_dense(layer: Mapping[str, Any]) -> Any:
    """One compressed-tensors layer of packed words -> the dense [N, K] fp32 weight it stands for."""
    import torch  # noqa: PLC0415

    words, scale = layer["weight_packed"], layer["weight_scale"].float()
    outputs, inputs = layer["weight_shape"].tolist()
    bits = words.shape[1] * WORD_BITS // inputs
    group = torch.arange(inputs) // -(-inputs // scale.shape[1])
    zeros = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.int32)
    if "weight_zero_point" in layer:
        zeros = unpack_rows(layer["weight_zero_point"], bits)[:outputs]
    stored = unpack_columns(words, bits)[:, :inputs]
    return (stored - zeros[:, group]).float() * scale[:, group]


def read_packing(directory: Path) -> Packing:
    """Read how a directory is quantized from its config.json; VariantError for what can't be read back."""
    try:
        config = json.loads((directory / "config.json").read_bytes())["quantization_config"]
    except (OSError, ValueError, KeyError):
        raise VariantError(f"{directory}: has no config.json with a quantization_config; is it a variant?") from None
    schemes = schemes_of(config)
    compressions = {scheme.compression for scheme in schemes}
    bits = {scheme.weights.num_bits for scheme in schemes}
    if len(compressions) != 1 or not compressions <= _DENSE.keys() or not bits <= {4, 8}:
        what = config.get("format") or f"{config.get('bits')} bits"
        raise VariantError(
            f"{directory}: {config.get('quant_method')} with {what} can't be read back; GPTQ and pack-quantized of 4 "
            "or 8 bits, w8a8 and FP8 can; measure other formats where they are served, with --replica URL"
        )
    inputs = schemes[0].input_activations
    return Packing(
        schemes[0].compression,
        # The defaults of a GPTQ configuration, whatever single modules have.
        schemes[0].weights.num_bits if schemes[0].compression == "gptq" else min(bits),
        inputs.num_bits if inputs else UNQUANTIZED_BITS,
        inputs.type if inputs else "int",
        inputs.columns if inputs else -1,
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
    parts = _PARTS[packing.format]
    layers = quantized_layers(tensors, packing.format)
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


_GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_PARTS: Mapping[str, tuple[str, ...]] = {
    "gptq": _GPTQ_PARTS,
    "int-quantized": ("weight", "weight_scale"),
    "float-quantized": ("weight", "weight_scale", "input_scale"),
    "fp8": ("weight", "weight_scale", "weight_scale_inv", "input_scale"),
    "pack-quantized": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
}
_DENSE: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "gptq": lambda layer: gptq_dense(layer, stored_bits(layer)),
    "int-quantized": int8_dense,
    "float-quantized": fp8_dense,
    "fp8": fp8_dense,
    "pack-quantized": pack_quantized_dense,
}


def packed_module(tensors: Mapping[str, Any], layers: Sequence[str], module: str, scheme: Scheme) -> Tensors:
    """Give the tensors of `layers`, stacked, as those of `module` in a variant of `scheme`."""
    if is_data_free(scheme):
        return _fp8_module(tensors, layers, module, scheme)
    packed = _stacked([{part: tensors[f"{layer}.{part}"][...] for part in _GPTQ_PARTS} for layer in layers])
    if scheme.format == "gptq":
        return {f"{module}.{part}": tensor.contiguous() for part, tensor in packed.items()}
    if scheme.compression == "pack-quantized":
        weight_args = weight_args_of(module, scheme)
        bits = weight_args.bits if weight_args else scheme.bits
        parts = gptq_to_pack_quantized(packed, bits, symmetric=is_symmetric(scheme, bits))
        return {f"{module}.{part}": tensor for part, tensor in parts.items()}
    weight, scale = gptq_to_int8(packed)
    return {f"{module}.weight": weight, f"{module}.weight_scale": scale}


def _fp8_module(tensors: Mapping[str, Any], layers: Sequence[str], module: str, scheme: Scheme) -> Tensors:
    import torch  # noqa: PLC0415

    weights, scales = ([tensors[f"{layer}.{part}"][...] for layer in layers] for part in ("weight", "scale"))
    block = scheme.weights.block_structure
    if block and any(weight.shape[0] % block[0] for weight in weights[:-1]):
        raise VariantError(
            f"{module}: its parts end inside a block of {block[0]} rows, and can't be stored in one matrix"
        )
    name = "weight_scale_inv" if scheme.compression == "fp8" else "weight_scale"
    # torch has no concatenation of FP8; its bytes are the same.
    joined = torch.cat([weight.view(torch.uint8) for weight in weights]).view(torch.float8_e4m3fn)
    return {f"{module}.weight": joined, f"{module}.{name}": torch.cat(scales)}


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
