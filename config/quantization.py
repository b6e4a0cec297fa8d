"""Quantization in the words of compressed-tensors: arguments of weights and activations, and config.json's own.

Names and values are those of `compressed_tensors.quantization` (quant_args.py, quant_scheme.py). Other methods'
configurations are read into the same words: GPTQ, AWQ, FP8 (`quant_method: fp8`), bitsandbytes, ModelOpt, MXFP4.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

# How a layer is stored: compressed-tensors' `format`; for other methods, the method (ModelOpt's NVFP4: its twin here).
Compression = Literal[
    "gptq",
    "awq",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "fp8",
    "bitsandbytes",
    "modelopt",
    "mxfp4",
]
Strategy = Literal["tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"]
COMPRESSED_TENSORS: frozenset[Compression] = frozenset(
    {
        "pack-quantized",
        "int-quantized",
        "float-quantized",
        "naive-quantized",
        "nvfp4-pack-quantized",
        "mxfp4-pack-quantized",
    }
)
UNQUANTIZED_BITS = 16
# Orders of activations that change which group an input is in.
REORDERING = frozenset({"group", "dynamic"})


class QuantizationArgs(BaseModel):
    """How a tensor is quantized.

    `group_size` are the inputs that share a scale (strategies group and tensor_group), `block_structure` the rows and
    columns of a block; `dynamic` scales are computed at run time; `actorder` is the order of inputs ("group": by
    activation, "static": within the file only).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Strategy = "tensor"
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool | Literal["local"] = False
    actorder: str | None = None

    @property
    def columns(self) -> int:
        """Inputs that share a scale; -1: all of them."""
        if self.block_structure is not None:
            return self.block_structure[1]
        return self.group_size if self.group_size is not None and self.group_size > 0 else -1

    @property
    def precision(self) -> str:
        """The name in headers, labels and requests: int4, int8, fp4, fp8."""
        return f"{'int' if self.type == 'int' else 'fp'}{self.num_bits}"


@dataclass(frozen=True, slots=True)
class QuantizationScheme:
    """How some linear layers are stored and computed; without `input_activations` in the model's own dtype.

    `where` says in messages which rule of a configuration this is; empty: all layers.
    """

    compression: Compression
    weights: QuantizationArgs
    input_activations: QuantizationArgs | None = None
    where: str = ""


def schemes_of(config: Mapping[str, Any] | None) -> tuple[QuantizationScheme, ...]:
    """Read a `quantization_config`; empty for a method or a form that is not known here."""
    method = str((config or {}).get("quant_method", "")).lower()
    read = _READERS.get("gptq" if "gptq" in method else method)
    if config is None or read is None:
        return ()
    try:
        return tuple(read(config))
    except (ValidationError, KeyError, TypeError, ValueError, AttributeError):
        return ()


def missing_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys that vLLM requires of a `quantization_config` of its method, and that are missing."""
    method = str(config.get("quant_method", "")).lower()
    return tuple(key for key in _REQUIRED_KEYS.get(method, ()) if key not in config)


def precision_of(config: Mapping[str, Any] | None) -> str | None:
    """Return the precision of most layers that a `quantization_config` describes; None if it is not known."""
    schemes = schemes_of(config)
    return schemes[0].weights.precision if schemes else None


def kv_cache_of(config: Mapping[str, Any] | None) -> QuantizationArgs | None:
    """Read the scheme of the KV cache that a checkpoint has scales for; None for most."""
    scheme = (config or {}).get("kv_cache_scheme")
    return parse_args(scheme) if isinstance(scheme, Mapping) else None


def parse_args(value: Mapping[str, Any]) -> QuantizationArgs:
    """Parse the arguments of a compressed-tensors configuration, without those of its observer.

    pydantic's ValidationError if they are not valid.
    """
    known = {key: value[key] for key in QuantizationArgs.model_fields if value.get(key) is not None}
    if known.get("group_size") == -1:
        known.pop("group_size")
        known.setdefault("strategy", "channel")
    if known.get("actorder") is True:
        known["actorder"] = "group"
    if "strategy" not in known:
        known["strategy"] = "block" if "block_structure" in known else "group" if "group_size" in known else "tensor"
    return QuantizationArgs.model_validate(known)


def grouped(num_bits: int, group_size: int, *, symmetric: bool = True, actorder: str | None = None) -> QuantizationArgs:
    """Return integer weights with a scale for each group of inputs; `group_size` -1: one for each output."""
    return QuantizationArgs(
        num_bits=num_bits,
        symmetric=symmetric,
        strategy="channel" if group_size <= 0 else "group",
        group_size=None if group_size <= 0 else group_size,
        actorder=actorder,
    )


def _gptq(config: Mapping[str, Any]) -> Iterator[QuantizationScheme]:
    yield _gptq_scheme(config)
    for rule, changes in (config.get("dynamic") or {}).items():
        if not rule.startswith("-:") and isinstance(changes, Mapping):
            yield _gptq_scheme({**config, **changes}, f" (rule {rule!r})")


def _gptq_scheme(config: Mapping[str, Any], where: str = "") -> QuantizationScheme:
    order = "group" if config.get("desc_act") else None
    weights = grouped(config["bits"], config["group_size"], symmetric=config.get("sym") is True, actorder=order)
    return QuantizationScheme("gptq", weights, where=where)


def _awq(config: Mapping[str, Any]) -> Iterator[QuantizationScheme]:
    bits = config.get("bits", config.get("w_bit", 4))
    size = config.get("group_size", config.get("q_group_size", 128))
    yield QuantizationScheme("awq", grouped(bits, size, symmetric=not config.get("zero_point", True)))


def _compressed_tensors(config: Mapping[str, Any]) -> Iterator[QuantizationScheme]:
    groups = [group for group in (config.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    for group in groups:
        weights = parse_args(group.get("weights") or {})
        inputs = group.get("input_activations")
        compression = group.get("format") or config.get("format") or _plain_compression(weights, inputs)
        if compression not in COMPRESSED_TENSORS:
            continue
        where = f" ({', '.join(group.get('targets') or ())})" if len(groups) > 1 else ""
        yield QuantizationScheme(compression, weights, parse_args(inputs) if inputs else None, where)


def _plain_compression(weights: QuantizationArgs, inputs: object) -> Compression:
    """Return the format that compressed-tensors infers where none is written."""
    if weights.type == "float":
        return "float-quantized"
    return "int-quantized" if inputs else "pack-quantized"


def _fp8(config: Mapping[str, Any]) -> Iterator[QuantizationScheme]:
    block = config.get("weight_block_size")
    weights: dict[str, Any] = {"strategy": "block", "block_structure": tuple(block)} if block else {}
    dynamic = config.get("activation_scheme", "dynamic") == "dynamic"
    inputs = QuantizationArgs(
        type="float",
        dynamic=dynamic,
        strategy="group" if block else "tensor",
        group_size=block[1] if block else None,
    )
    yield QuantizationScheme("fp8", QuantizationArgs.model_validate({"type": "float", **weights}), inputs)


def _bitsandbytes(config: Mapping[str, Any]) -> Iterator[QuantizationScheme]:
    if config.get("load_in_4bit"):
        # NF4 and FP4, in blocks of 64 of the flattened matrix.
        yield QuantizationScheme(
            "bitsandbytes", QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=64)
        )
    else:
        yield QuantizationScheme("bitsandbytes", QuantizationArgs(strategy="channel"))


def _modelopt(config: Mapping[str, Any]) -> Iterator[QuantizationScheme]:
    settings = config.get("quantization") if isinstance(config.get("quantization"), Mapping) else config
    algorithm = str((settings or {}).get("quant_algo", "")).upper()
    if algorithm == "FP8":
        yield QuantizationScheme("modelopt", QuantizationArgs(type="float"), QuantizationArgs(type="float"))
    elif algorithm.startswith("NVFP4"):
        inputs = None if "A16" in algorithm else _NVFP4.model_copy(update={"dynamic": "local"})
        yield QuantizationScheme("modelopt", _NVFP4, inputs)


def _mxfp4(_: Mapping[str, Any]) -> Iterator[QuantizationScheme]:
    yield QuantizationScheme("mxfp4", QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32))


# get_from_keys without a default in from_config of auto_gptq.py and fp8.py of vLLM.
_REQUIRED_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"gptq": ("bits", "group_size", "desc_act", "sym"), "fp8": ("activation_scheme",)}
)
_NVFP4 = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
_READERS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[QuantizationScheme]]] = MappingProxyType(
    {
        "gptq": _gptq,
        "awq": _awq,
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
        "bitsandbytes": _bitsandbytes,
        "modelopt": _modelopt,
        "modelopt_fp4": _modelopt,
        "mxfp4": _mxfp4,
    }
)
