"""A base and its variant as dense transformers models: fp32 on a CPU, bf16 on CUDA, with w8a8's rounding of inputs."""

import gc
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from quantize.dense_experts import round_expert_inputs
from quantize.errors import RecipeError, VariantError
from quantize.model_class import model_class
from quantize.model_files.weight_files import stored_tensors, weight_files
from quantize.modules import is_expert
from quantize.variants.weights import read_dense, read_packing, with_base_matrices

_INT8_MAX = 127
_PREFIX = re.compile(r"^.*?\b(?=(layers|h|blocks)\.\d+\.)")
# Parts of one matrix in some families: it is rounded once for each of them, which changes nothing.
_MATRIX_PART = re.compile(r"(gate|up)_proj$")
_VISION = re.compile(r"(^|\.)(vision|visual)")
# Of a GPU's free memory, what weights may take; the rest is for activations, keys and values.
_SHARE_FOR_WEIGHTS = 0.85


def placement(model_bytes: int, free_bytes: Sequence[int]) -> str:
    """Choose where a model of that size runs, given the free memory of each GPU: one GPU, all of them, or the CPU."""
    usable = [_SHARE_FOR_WEIGHTS * free for free in free_bytes]
    if usable and model_bytes <= usable[0]:
        return "cuda:0"
    return "auto" if model_bytes <= sum(usable) else "cpu"


def load_base(base: Path) -> Any:
    """Load an unquantized model for evaluation."""
    kind, _ = _class_of(base)
    return _placed(partial(kind.from_pretrained, base), base, local_files_only=True)


def load_variant(variant: Path, base: Path) -> Any:
    """Load a variant as the dense model that it stands for; VariantError where it doesn't fit its base."""
    dense, layers = read_dense(variant)
    dense = with_base_matrices(dense, stored_tensors(base))
    kind, config = _class_of(base)
    try:
        model = _placed(partial(kind.from_pretrained, None), base, config=config, state_dict=dense)
    except RuntimeError as error:
        raise VariantError(f"{variant}: doesn't fit {base}: {_first_line(error)}") from None
    if read_packing(variant).activation_bits == 8:
        _quantize_inputs(model, set(layers))
    return model


def fake_quantize_tokens(activations: Any) -> Any:
    """[..., K] -> the same, rounded to symmetric int8 with one scale a token, as w8a8 kernels do."""
    scale = (activations.abs().amax(dim=-1, keepdim=True) / _INT8_MAX).clamp(min=1e-10)
    return (activations / scale).round().clamp(-_INT8_MAX - 1, _INT8_MAX) * scale


def runtime_fingerprint() -> str:
    """Name what computes, as far as it shows in the last digits."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return f"{device} torch {torch.__version__} transformers {transformers.__version__}"


def reclaim() -> None:
    """Give back the memory of models that nobody names any more."""
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


def _placed(load: Callable[..., Any], base: Path, **options: Any) -> Any:
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return load(dtype=torch.float32, **options).eval()
    size = sum(file.stat().st_size for file in weight_files(base))
    free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    where = placement(size, free)
    if where == "auto":
        return load(dtype=torch.bfloat16, device_map=where, **options).eval()
    return load(dtype=torch.bfloat16, **options).to(where).eval()


def _quantize_inputs(model: Any, layers: set[str]) -> None:
    def rounded(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (fake_quantize_tokens(inputs[0]), *inputs[1:])

    found = {_inside_blocks(name): module for name, module in model.named_modules() if not _VISION.search(name)}
    if any(map(is_expert, layers)):
        round_expert_inputs(model, fake_quantize_tokens)
    for layer in sorted(layers):
        name = _inside_blocks(layer)
        module = found.get(name) or found.get(_MATRIX_PART.sub("gate_up_proj", name))
        if module is not None:
            module.register_forward_pre_hook(rounded)
        elif not is_expert(layer):
            raise VariantError(f"{layer}: no such module in the base; its activations can't be rounded")


def _inside_blocks(name: str) -> str:
    """Cut off what stands before the blocks: a multimodal model has other prefixes on disk than in memory."""
    return _PREFIX.sub("", name)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
