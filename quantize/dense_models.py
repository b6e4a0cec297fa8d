"""A base and its variant as dense transformers models: fp32 on a CPU, bf16 on CUDA.

The inputs of w8a8 and FP8 layers are rounded as kernels round them.
"""

import gc
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from config.quantization import kv_cache_of
from quantize.dense_experts import round_expert_inputs
from quantize.errors import MachineError, RecipeError, VariantError
from quantize.kv_cache import round_cache
from quantize.layered_models import LayeredModel, open_layered
from quantize.model_class import model_class
from quantize.model_files.weight_files import stored_tensors
from quantize.modules import inside_blocks, is_expert
from quantize.schemes.cache_scales import CACHE_TENSORS, KEYS, VALUES, attention_names, layer_count
from quantize.variants.weights import LazyTensor, Packing, lazy_dense, lazy_tensors, read_packing, with_base_matrices

_INT8_MAX = 127
_FP8_MAX = 448.0  # of E4M3
INT8_TOKENS = Packing("int-quantized", 8, 8)
# Parts of one matrix in some families: it is rounded once for each of them, which changes nothing.
_MATRIX_PART = re.compile(r"(gate|up)_proj$")
_VISION = re.compile(r"(^|\.)(vision|visual)")
# Of a GPU's free memory, what weights may take; the rest is for activations, keys and values.
_SHARE_FOR_WEIGHTS = 0.85


def placement(model_bytes: int, free_bytes: Sequence[int]) -> str:
    """Choose where a model of that size runs whole, given each GPU's free memory: one GPU, all of them, or the CPU.

    MachineError where there are GPUs and it fits none: on the CPU beside them it would take hours.
    """
    usable = [int(_SHARE_FOR_WEIGHTS * free) for free in free_bytes]
    if not usable:
        return "cpu"
    if model_bytes <= usable[0]:
        return "cuda:0"
    if model_bytes <= sum(usable):
        return "auto"
    count = -(-model_bytes // max(usable))
    raise MachineError(
        f"generation needs the whole model, {model_bytes / 1e9:.1f} GB in bf16, and {sum(usable) / 1e9:.1f} GB are "
        f"usable on {len(usable)} GPUs; {count} GPUs like the largest here would do, or leave generation out: "
        "--eval-prompts 0, no --tasks",
    )


def load_base(base: Path) -> Any:
    """Load an unquantized model whole, for generation."""
    kind, _ = _class_of(base)
    return _placed(partial(kind.from_pretrained, base), base, local_files_only=True)


def load_variant(variant: Path, base: Path) -> Any:
    """Load a variant whole, as the dense model that it stands for; VariantError where it doesn't fit its base."""
    dense, layers = _dense_tensors(variant, base)
    scales = _take_cache_scales(dense, variant)
    kind, config = _class_for(variant, base)
    try:
        model = _placed(partial(kind.from_pretrained, None), base, config=config, state_dict=dense)
    except RuntimeError as error:
        raise VariantError(f"{variant}: doesn't fit {base}: {_first_line(error)}") from None
    _round_activations(model, variant, layers)
    round_cache(model, scales, variant)
    return model


def layered_base(base: Path) -> LayeredModel:
    """Open an unquantized model for reading text, one layer in memory at a time."""
    return open_layered(_class_of(base), lazy_tensors(base), base, *_where_layers_run())


def layered_variant(variant: Path, base: Path) -> LayeredModel:
    """Open a variant for reading text as the dense model that it stands for, one layer in memory at a time."""
    dense, layers = _dense_tensors(variant, base)
    scales = _take_cache_scales(dense, variant)
    layered = open_layered(_class_for(variant, base), dense, variant, *_where_layers_run())
    _round_activations(layered.model, variant, layers)
    round_cache(layered.model, scales, variant)
    return layered


def fake_quantize_tokens(activations: Any, packing: Packing = INT8_TOKENS) -> Any:
    """[..., K] -> the same, rounded to int8 or FP8 with one scale a token (or group of it), as kernels do."""
    import torch  # noqa: PLC0415

    group = packing.activation_group if packing.activation_group > 0 else activations.shape[-1]
    grouped = activations.reshape(*activations.shape[:-1], -1, group)
    largest = grouped.abs().amax(dim=-1, keepdim=True)
    if packing.activation_type == "float":
        scale = (largest / _FP8_MAX).clamp(min=1e-10)
        rounded = (grouped / scale).to(torch.float8_e4m3fn).to(activations.dtype)
    else:
        scale = (largest / _INT8_MAX).clamp(min=1e-10)
        rounded = (grouped / scale).round().clamp(-_INT8_MAX - 1, _INT8_MAX)
    return (rounded * scale).reshape(activations.shape)


def runtime_fingerprint() -> str:
    """Name what computes, as far as it shows in the last digits."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return f"{device} torch {torch.__version__} transformers {transformers.__version__}"


def reclaim() -> None:
    """Give back the memory of models that are not referenced any more."""
    import torch  # noqa: PLC0415

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _class_of(base: Path) -> tuple[Any, Any]:
    """Give a base's model class and its config; RecipeError where transformers has no such class."""
    from transformers import AutoConfig  # noqa: PLC0415

    config = AutoConfig.from_pretrained(base, local_files_only=True)
    kind = model_class(config)
    if kind is None:
        raise RecipeError(f"{base}: transformers has no language model of type {config.model_type}")
    return kind, config


def _class_for(variant: Path, base: Path) -> tuple[Any, Any]:
    """Give the base's model class and config, with an output matrix of its own where the variant says that it has."""
    kind, config = _class_of(base)
    if json.loads((variant / "config.json").read_bytes()).get("tie_word_embeddings") is False:
        config.tie_word_embeddings = False
    return kind, config


def _placed(load: Callable[..., Any], base: Path, **options: Any) -> Any:
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return load(dtype=torch.float32, **options).eval()
    size = sum(2 * prod(tensor.shape) for tensor in stored_tensors(base).values())
    free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    where = placement(size, free)
    # All layers must lie on GPUs: nothing is left to the CPU or the disk.
    room = {index: int(_SHARE_FOR_WEIGHTS * size) for index, size in enumerate(free)} if where == "auto" else None
    device_map = where if where == "auto" else {"": where}
    return load(dtype=torch.bfloat16, device_map=device_map, max_memory=room, **options).eval()


def _dense_tensors(variant: Path, base: Path) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    dense, layers = lazy_dense(variant)
    return with_base_matrices(dense, stored_tensors(base)), layers


def _take_cache_scales(tensors: dict[str, LazyTensor], variant: Path) -> dict[str, tuple[Any, Any]]:
    """Take the scales of a KV cache out of a variant's tensors; gives those by layer that its configuration uses."""
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(CACHE_TENSORS)}
    config = json.loads((variant / "config.json").read_bytes())
    if kv_cache_of(config["quantization_config"]) is None:
        return {}
    found: dict[str, tuple[Any, Any]] = {}
    for name in attention_names(tensors, layer_count(config)):
        keys, values = scales.get(f"{name}{KEYS}"), scales.get(f"{name}{VALUES}")
        if keys is None or values is None:
            raise VariantError(
                f"{variant}: has no scales for the FP8 keys and values of {name}; measure it where it is served, "
                "with --replica URL"
            )
        found[inside_blocks(f"{name}.")[:-1]] = (keys[...], values[...])
    return found


def _where_layers_run() -> tuple[Any, str]:
    """Choose dtype and device: bf16 on a GPU, as it is served; fp32 on a CPU, where a layer fits and is more exact.

    SmolLM2-135M in bf16 is 0.0008 nats from itself in fp32, with 98.6 % equal first choices; int8 variants are 0.002.
    """
    import torch  # noqa: PLC0415

    return (torch.bfloat16, "cuda:0") if torch.cuda.is_available() else (torch.float32, "cpu")


def _round_activations(model: Any, variant: Path, names: Iterable[str]) -> None:
    packing = read_packing(variant)
    if packing.activation_bits != 8:
        return
    layers = set(names)
    tokens = partial(fake_quantize_tokens, packing=packing)

    def rounded(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (tokens(inputs[0]), *inputs[1:])

    found = {inside_blocks(name): module for name, module in model.named_modules() if not _VISION.search(name)}
    if any(map(is_expert, layers)):
        round_expert_inputs(model, tokens)
    for layer in sorted(layers):
        name = inside_blocks(layer)
        module = found.get(name) or found.get(_MATRIX_PART.sub("gate_up_proj", name))
        if module is not None:
            module.register_forward_pre_hook(rounded)
        elif not is_expert(layer):
            raise VariantError(f"{layer}: no such module in the base; its activations can't be rounded")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
