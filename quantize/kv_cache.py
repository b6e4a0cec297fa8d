"""Keys and values on their way into the KV cache: recorded, or rounded to FP8 as vLLM stores and reads them.

vLLM divides keys, rotated as they are cached, and values by a scale of their layer, and rounds them to E4M3; numbers
beyond its range become its largest (reshape_and_cache of its CUDA and CPU kernels). What attention reads is multiplied
by the scale again. Here numbers are rounded to nearest, as by CUDA; the CPU kernel of vLLM 0.32 rounds towards zero.
Layers are named as inside their model's blocks: `layers.0.self_attn`.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from quantize.errors import VariantError
from quantize.modules import inside_blocks

E4M3_MAX = 448.0
# What an attention module's forward calls the cache.
_CACHE_ARGUMENTS = ("past_key_values", "layer_past")

# Keys and values [batch, heads, tokens, head size] -> those that the cache gets.
CacheChange = Callable[[Any, Any], tuple[Any, Any]]


def rounded_to_e4m3(values: Any, scale: Any) -> Any:
    """Give what an FP8 cache holds of values [B, H, T, D]; `scale` is one number, or one a head [H]."""
    import torch  # noqa: PLC0415

    factor = scale.to(values.device, values.dtype).reshape(1, -1, 1, 1)
    stored = (values / factor).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return stored.to(values.dtype) * factor


class ChangedCache:
    """Stands before a cache, or before none, and changes what one layer writes into it."""

    def __init__(self, cache: Any, change: CacheChange) -> None:
        self._cache = cache
        self._change = change

    def update(self, keys: Any, values: Any, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        """Take a layer's new keys and values; give all that it has."""
        keys, values = self._change(keys, values)
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        """Ask the cache for anything else."""
        return getattr(self._cache, name)


def attention_modules(model: Any) -> dict[str, Any]:
    """Map layers to the modules of a model that write keys and values: those that take a cache, the innermost."""
    takers = {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "layer_idx", None) is not None and _cache_argument(module)
    }
    outer = {name.rpartition(".")[0] for name in takers}
    return {inside_blocks(name): module for name, module in takers.items() if name not in outer}


def change_cache(module: Any, change: CacheChange) -> Any:
    """Change what an attention module writes into the cache, also where it gets none; gives the hook's handle."""
    name = _cache_argument(module)

    def before(_: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return inputs, {**options, name: ChangedCache(options.get(name), change)}

    return module.register_forward_pre_hook(before, with_kwargs=True)


def round_cache(model: Any, scales: Mapping[str, tuple[Any, Any]], source: Path) -> None:
    """Let every layer of `scales` (of keys, of values) write what an FP8 cache holds; `source` is named in errors."""
    modules = attention_modules(model)
    for layer, pair in scales.items():
        if layer not in modules:
            raise VariantError(f"{source}: has scales of keys and values for {layer}, and the model has no such layer")
        change_cache(modules[layer], partial(_rounded, pair))


def _rounded(scales: tuple[Any, Any], keys: Any, values: Any) -> tuple[Any, Any]:
    return rounded_to_e4m3(keys, scales[0]), rounded_to_e4m3(values, scales[1])


class LargestRecorder:
    """Keeps the largest absolute key and value that a layer wrote."""

    def __init__(self) -> None:
        self.largest = (0.0, 0.0)

    def __call__(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Take in keys and values, and leave them as they are."""
        found = float(keys.abs().max()), float(values.abs().max())
        self.largest = max(self.largest[0], found[0]), max(self.largest[1], found[1])
        return keys, values


@contextmanager
def recorded(modules: Mapping[str, Any], recorders: Mapping[str, CacheChange]) -> Iterator[None]:
    """Let each layer's recorder see what its module writes, while the body runs."""
    handles = [change_cache(modules[layer], recorder) for layer, recorder in recorders.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_texts(model: Any, samples: Sequence[Sequence[int]]) -> Iterator[int]:
    """Let a model read token ids without a cache; yields the tokens of each sample when it is read."""
    import torch  # noqa: PLC0415

    device = model.get_input_embeddings().weight.device
    for ids in samples:
        model.base_model(torch.tensor([list(ids)], device=device), use_cache=False)
        yield len(ids)


def _cache_argument(module: Any) -> str:
    parameters = inspect.signature(type(module).forward).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in parameters), "")
