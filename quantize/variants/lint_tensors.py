"""What must hold of a quantized directory's tensors, by their headers: names, shapes, dtypes, and what vLLM fuses."""

from collections.abc import Iterator, Mapping

from config.manifest import Scheme
from config.quantization import kv_cache_of
from quantize.base import BaseModel
from quantize.model_files.safetensors_header import StoredTensor
from quantize.schemes.cache_scales import CACHE_TENSORS
from quantize.variants.artefact import Artefact
from quantize.variants.lint_rules import Finding
from quantize.variants.storage_format import (
    Kind,
    StorageFormat,
    configured_format,
    fused_layers,
    kind_of,
    parts_of,
    quantized_layers,
    scheme_format,
)

_NO_WEIGHTS = ("rotary_emb.inv_freq",)
_DTYPE_BITS = {"I32": 32, "I8": 8, "U8": 8, "F8_E4M3": 8}


def tensor_findings(artefact: Artefact, base: BaseModel | None, scheme: Scheme) -> Iterator[Finding]:
    """Hold names, shapes and dtypes against configuration, scheme and the base's tensors."""
    kind = kind_of(artefact.quantization_config)
    if kind is None:
        return
    layers = quantized_layers(artefact.entries, kind)
    if not layers:
        yield Finding("tensors", "model.safetensors", "holds no quantized layer")
    quantized = set(layers)
    owned = {name for name in artefact.entries if _is_part(name, quantized, kind) and not _is_bias(name)}
    shapes = base.shapes if base else {}
    for layer in layers:
        storage_format = configured_format(artefact.quantization_config, layer)
        if storage_format is None:
            yield Finding("tensors", layer, "is quantized, and config.json says that it is not")
            continue
        if kind == "mxfp4":
            continue  # all experts of a block in one tensor
        yield from _layer_findings(artefact, layer, storage_format, shapes if base else None)
        wanted = scheme_format(scheme, layer, kind)
        if wanted != storage_format:
            yield Finding(
                "tensors", layer, f"is {storage_format}, and scheme {scheme.name} wants {wanted or 'it left alone'}"
            )
    if base is not None:
        yield from _base_findings(artefact, base, set(layers), scheme, kind)
        yield from _extra_findings(artefact, base, owned)


def _layer_findings(
    artefact: Artefact, layer: str, storage_format: StorageFormat, shapes: Mapping[str, tuple[int, int]] | None
) -> Iterator[Finding]:
    shape = _own_shape(artefact.entries, layer, storage_format) if shapes is None else shapes.get(layer)
    if shape is None and shapes is None and storage_format.kind == "bitsandbytes":
        return  # flattened
    if shape is None:
        yield Finding("tensors", layer, "is quantized, and the base has no matrix of that name")
        return
    expected = parts_of(storage_format, shape[0], shape[1])
    for part, (dtypes, wanted) in expected.items():
        entry = artefact.entries.get(f"{layer}.{part}")
        if entry is None:
            yield Finding("tensors", f"{layer}.{part}", "is missing")
        elif entry.shape != wanted and not (wanted == () and entry.shape == (1,)):
            yield Finding(
                "tensors", f"{layer}.{part}", f"has shape {_x(entry.shape)}, not {_x(wanted)} ({storage_format})"
            )
        elif entry.dtype not in dtypes:
            yield Finding("tensors", f"{layer}.{part}", f"is {entry.dtype}, not {' or '.join(dtypes)}")


def _base_findings(
    artefact: Artefact, base: BaseModel, layers: set[str], scheme: Scheme, kind: Kind
) -> Iterator[Finding]:
    tied = bool(artefact.config.get("tie_word_embeddings"))
    stored_in = base.modules.stored_in
    for name, shape in ((name, tensor.shape) for name, tensor in base.tensors.items()):
        modules = stored_in.get(name, ())
        if modules and layers.issuperset(modules):
            continue
        if name.endswith(_NO_WEIGHTS) or (tied and name == "lm_head.weight"):
            continue
        entry = artefact.entries.get(name)
        wanted = [module for module in modules if scheme_format(scheme, module, kind) is not None]
        if entry is None:
            yield Finding("tensors", name, "is in the base, and missing here")
        elif entry.shape != shape:
            yield Finding("tensors", name, f"has shape {_x(entry.shape)}, and {_x(shape)} in the base")
        elif not entry.dtype.startswith(("F", "BF")):
            yield Finding("tensors", name, f"is {entry.dtype}, and has no scales")
        elif wanted:
            yield Finding("tensors", wanted[0], f"is not quantized, and scheme {scheme.name} wants it to be")


def _extra_findings(artefact: Artefact, base: BaseModel, owned: set[str]) -> Iterator[Finding]:
    tied = bool(artefact.config.get("tie_word_embeddings"))
    if kv_cache_of(artefact.quantization_config) is not None:
        owned = owned | {name for name in artefact.entries if name.endswith(CACHE_TENSORS)}
    for name in sorted(artefact.entries.keys() - base.tensors.keys() - owned):
        if not (name.endswith(_NO_WEIGHTS) or _is_bias(name) or (tied and name == "lm_head.weight")):
            yield Finding("tensors", name, "is not in the base")


def _own_shape(
    entries: Mapping[str, StoredTensor], layer: str, storage_format: StorageFormat
) -> tuple[int, int] | None:
    """Tell a layer's (outputs, inputs) from its own tensors, where there is no base to ask."""
    if storage_format.kind == "gptq":
        scales, g_idx = entries.get(f"{layer}.scales"), entries.get(f"{layer}.g_idx")
        return (scales.shape[-1], g_idx.shape[0]) if scales and g_idx else None
    if storage_format.kind == "awq":
        scales, words = entries.get(f"{layer}.scales"), entries.get(f"{layer}.qweight")
        return (scales.shape[-1], words.shape[0]) if scales and words else None
    packed = entries.get(f"{layer}.weight_packed")
    if packed:
        word_bits = _DTYPE_BITS.get(packed.dtype, 32)
        return packed.shape[0], packed.shape[-1] * (word_bits // storage_format.bits)
    weight = entries.get(f"{layer}.weight")
    if weight is None or storage_format.kind == "bitsandbytes":
        return None
    return weight.shape[0], weight.shape[-1] * (_DTYPE_BITS.get(weight.dtype, 8) // storage_format.bits)


def fused_findings(artefact: Artefact) -> Iterator[Finding]:
    """Find layers that vLLM fuses and that differ: from each other, or from what is told about the fused name."""
    kind = kind_of(artefact.quantization_config)
    if kind is None:
        return
    layers = set(quantized_layers(artefact.entries, kind))
    matrices = {name.removesuffix(".weight") for name in artefact.entries if name.endswith(".weight")}
    for fused, members in fused_layers(layers | matrices).items():
        formats = {
            member: configured_format(artefact.quantization_config, member) if member in layers else None
            for member in members
        }
        if len(set(formats.values())) > 1:
            description = ", ".join(
                f"{member.rpartition('.')[2]} is {storage_format or 'unquantized'}"
                for member, storage_format in formats.items()
            )
            yield Finding("fused", fused, f"vLLM loads these as one, so they must agree: {description}")
            continue
        (storage_format,) = set(formats.values())
        # Where nothing is packed vLLM sees it by the dtype; compressed-tensors asks for each member by its own name.
        seen = (
            configured_format(artefact.quantization_config, fused)
            if kind == "gptq" and storage_format is not None
            else storage_format
        )
        if seen != storage_format:
            problem = (
                f"vLLM asks for this name, of which config.json says {seen or 'unquantized'}; "
                f"its parts are {storage_format}"
            )
            yield Finding("fused", fused, problem)


def _is_part(name: str, quantized: set[str], kind: Kind) -> bool:
    """Whether a tensor belongs to a quantized layer; bitsandbytes names parts of `weight`, MXFP4 parts of experts."""
    if kind == "mxfp4" and name.endswith(("_blocks", "_scales")):
        return name.removesuffix("_blocks").removesuffix("_scales") in quantized
    return name.rpartition(".")[0] in quantized or name.partition(".weight.")[0] in quantized


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
