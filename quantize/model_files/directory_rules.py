"""Which directories are a base that can be quantized: decisions over what a directory lists and its config says."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantize.model_files.weight_files import INDEX_FILE, WHOLE_FILE, loadable

_ADAPTER_CONFIG = "adapter_config.json"
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_LOCAL_PATH = re.compile(r"((/[^/]+){2,}|~(/[^/]+)+|\.{1,2}/.+|[A-Za-z]:\\.+)/?")


@dataclass(frozen=True, slots=True)
class Listing:
    """What a directory has: the names in it, and `base_model_name_or_path` of its adapter if it has one."""

    names: frozenset[str]
    adapter_base: str | None = None

    @property
    def safetensors(self) -> list[str]:
        """The safetensors files, adapters and Mistral's consolidated ones left out."""
        return loadable(sorted(name for name in self.names if name.endswith(".safetensors")))


def missing_model(listing: Listing) -> str | None:
    """Say why a directory holds no model that transformers loads, and what to do; None if it holds one."""
    names = listing.names
    if {WHOLE_FILE, INDEX_FILE} & names and "config.json" in names:
        return None
    if _ADAPTER_CONFIG in names and not listing.safetensors:
        base = f" of {listing.adapter_base}" if listing.adapter_base else ""
        return f"is a LoRA adapter{base}; merge it first: peft's merge_and_unload(), then save_pretrained()"
    if "snapshots" in names and "config.json" not in names:
        return "is an entry of the Hugging Face cache; pass the directory below snapshots/"
    if any(name.startswith("consolidated") for name in names) and not listing.safetensors:
        return "has Mistral's format only (consolidated.safetensors); get the transformers format, model*.safetensors"
    if any(name.endswith(".gguf") for name in names) and not listing.safetensors:
        return "has only GGUF weights; run python -m quantize.gguf FILE OUT_DIR first"
    if "config.json" not in names:
        return "not a transformers model: it has no config.json"
    return _missing_weights(listing)


def _missing_weights(listing: Listing) -> str:
    if not listing.safetensors:
        if any(name.endswith((".bin", ".pt", ".pth")) for name in listing.names):
            return "has only .bin weights; save the model as safetensors first"
        return "not a transformers model: it has no *.safetensors weights"
    if any(map(_SHARD.search, listing.safetensors)):
        return f"has shards, but no {INDEX_FILE}; copy it from where the model came from"
    return f"has neither {WHOLE_FILE} nor {INDEX_FILE}, and transformers loads no other name; rename the weights"


def ambiguous_weights(listing: Listing, indexed: frozenset[str] | None) -> str | None:
    """Say where transformers and vLLM would load different files; `indexed` are the files of the index, if any."""
    if indexed is not None and WHOLE_FILE in listing.names and WHOLE_FILE not in indexed:
        return (
            f"has {WHOLE_FILE} and an index of other files: transformers loads the first, vLLM the others; remove one"
        )
    return None


def adapter_conflict(listing: Listing, *, peft_installed: bool) -> str | None:
    """Say whether transformers would apply the adapter beside merged weights; it does where peft is installed."""
    if _ADAPTER_CONFIG in listing.names and peft_installed:
        return f"has {_ADAPTER_CONFIG} beside its weights, and peft would apply that adapter to them; move it away"
    return None


def quantization_problem(config: Mapping[str, Any], dtypes: frozenset[str]) -> str | None:
    """Say why a model is not unquantized: by its config, or by the dtypes of its tensors (safetensors' names).

    `quantization_config: null` means unquantized. QLoRA merges leave the trainer's with weights that are not.
    """
    quantization = config.get("quantization_config")
    packed = sorted(dtypes - _FLOATS)
    if not quantization:
        what = f"stores {', '.join(packed)} tensors"
        return f"{what}: is already quantized; quantize its unquantized parent instead" if packed else None
    method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else "invalid"
    if packed:
        return f"is already quantized ({method}); quantize its unquantized parent instead"
    return (
        f"config.json has a quantization_config ({method}), and the weights are not quantized, as a QLoRA merge leaves "
        "them; remove quantization_config from config.json"
    )


def multimodal_parts(config: Mapping[str, Any]) -> tuple[str, ...]:
    """List the parts of a multimodal model beside its text model, by their keys in config.json."""
    return tuple(
        key for key in sorted(config) if re.fullmatch(r"(vision|audio|video|image|speech|vit|vq)\w*_config", key)
    )


def notes(listing: Listing, loaded: frozenset[str], config: Mapping[str, Any]) -> Iterator[str]:
    """Say what of a directory is left out of the variant although it looks like part of the model."""
    unused = sorted(name for name in listing.names if name.endswith(".safetensors") and name not in loaded)
    if unused:
        yield f"not used: {', '.join(unused)}"
    if any(name.endswith(".bin") and name.startswith("pytorch_model") for name in listing.names):
        yield "not used: pytorch_model*.bin, beside safetensors"
    parts = multimodal_parts(config)
    if parts:
        yield f"multimodal: the language model is quantized, the rest copied as it is ({', '.join(parts)})"
    if "quantization_config" in config:
        yield "quantization_config of config.json is null, and ignored"


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a config.json without the local paths in it, such as `_name_or_path` of a trainer; at any depth."""
    return {
        key: portable_config(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not (isinstance(value, str) and _LOCAL_PATH.fullmatch(value))
    }
