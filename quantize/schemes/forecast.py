"""What a variant will weigh, from its base's shapes and its scheme alone: pure arithmetic, no torch."""

from collections.abc import Mapping
from math import prod

from config.manifest import Scheme
from config.quantization import Compression, QuantizationArgs
from quantize.base import BaseModel
from quantize.schemes.cache_scales import SCALE_BYTES, scale_names
from quantize.schemes.module_config import ZERO_POINT_BITS, WeightArgs, weight_args_of

_FP16_BYTES = 2
_FP32_BYTES = 4
_INT32_BYTES = 4
_INT64_BYTES = 8


def predicted_bytes(base: BaseModel, scheme: Scheme) -> int:
    """Bytes of all tensors of the variant that `scheme` makes of `base`, without file headers (under 0.1 % of it)."""
    return sum(predicted_tensors(base, scheme).values())


def predicted_tensors(base: BaseModel, scheme: Scheme) -> dict[str, int]:
    """Bytes of each tensor by the name it will have; what isn't quantized is kept as the base stores it."""
    sizes: dict[str, int] = {}
    stored_in = base.modules.stored_in
    for name, tensor in base.tensors.items():
        args = {module: weight_args_of(module, scheme) for module in stored_in.get(name, ())}
        if not any(args.values()):
            sizes[name] = tensor.bytes
        for module, weight_args in args.items():
            if weight_args:
                sizes.update(packed_bytes(module, base.shapes[module], weight_args, scheme.compression, scheme.weights))
    if scheme.kv_cache is not None:
        sizes.update((name, SCALE_BYTES) for names in scale_names(base).values() for name in names)
    return sizes


def packed_bytes(
    module: str,
    shape: tuple[int, int],
    weight_args: WeightArgs,
    compression: Compression = "gptq",
    weights: QuantizationArgs | None = None,
) -> dict[str, int]:
    """Bytes of one quantized layer's tensors; `shape` is (out_features, in_features), `weights` those of the scheme."""
    rows, columns = shape
    if weights is not None and weights.block_structure is not None:
        blocks = -(-rows // weights.block_structure[0]) * -(-columns // weights.block_structure[1])
        return {f"{module}.weight": rows * columns, f"{module}.weight_scale_inv": blocks * _FP32_BYTES}
    if weights is not None and weights.strategy == "tensor":
        return {f"{module}.weight": rows * columns, f"{module}.weight_scale": _FP32_BYTES}
    if compression in ("int-quantized", "float-quantized"):
        return {f"{module}.weight": rows * columns, f"{module}.weight_scale": rows * _FP32_BYTES}
    groups = 1 if weight_args.group_size < 0 else -(-columns // weight_args.group_size)
    if compression == "pack-quantized":
        asymmetric = weights is not None and not weights.symmetric and weight_args.bits in ZERO_POINT_BITS
        zero_bytes = {f"{module}.weight_zero_point": rows * groups * weight_args.bits // 8} if asymmetric else {}
        return {
            f"{module}.weight_packed": rows * columns * weight_args.bits // 8,
            f"{module}.weight_scale": rows * groups * _FP16_BYTES,
            f"{module}.weight_shape": 2 * _INT64_BYTES,
            **zero_bytes,
        }
    return {
        f"{module}.qweight": rows * columns * weight_args.bits // 8,
        f"{module}.qzeros": rows * groups * weight_args.bits // 8,
        f"{module}.scales": rows * groups * _FP16_BYTES,
        f"{module}.g_idx": columns * _INT32_BYTES,
    }


def disk_bytes(base: BaseModel, scheme: Scheme, solves: int = 1) -> int:
    """Bytes that must be free for the stages: solved layers (a byte a weight, each time), the checkpoint, and a margin.

    The margin is for tokens and outputs of the parent: as much as the checkpoint, and what it keeps once more.
    """
    variant = predicted_bytes(base, scheme)
    kept = sum(size for name, size in predicted_tensors(base, scheme).items() if name in base.tensors)
    return solves * parameters(base.shapes) + 2 * variant + kept


def parameters(shapes: Mapping[str, tuple[int, int]]) -> int:
    """Count the weights of linear layers."""
    return sum(prod(shape) for shape in shapes.values())
