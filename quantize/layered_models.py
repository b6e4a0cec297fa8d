"""A transformers model with one decoder layer in memory at a time: a forward pass reads each from its files.

Everything but the layers (embeddings, final norm, output matrix) stays in memory. transformers' own loader renames and
merges the tensors of a layer (`transformers.core_model_loading`, as in 5.19), so that every architecture that it loads
whole can be read by layers, experts included.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import VariantError
from quantize.variants.weights import LazyTensor

# What decoders call their list of layers: most; GPT-2 and its kin; MPT and DBRX.
_LAYER_LISTS = ("layers", "h", "blocks")


@dataclass(frozen=True, slots=True)
class LayeredModel:
    """A model in evaluation mode; `groups` maps each decoder layer to its tensors by their names on disk."""

    model: Any
    layers: tuple[Any, ...]
    groups: tuple[Mapping[str, LazyTensor], ...]
    loader: "_Loader"

    @contextmanager
    def reading(self) -> Iterator[Any]:
        """Lend the model for forward passes; each pass loads every layer before its use and drops it after it."""
        handles = []
        for number, layer in enumerate(self.layers):
            shell = [
                (part, name, value) for part in layer.modules() for name, value in part.named_parameters(recurse=False)
            ]
            handles.append(layer.register_forward_pre_hook(lambda *_, number=number: self._load(number)))
            handles.append(layer.register_forward_hook(lambda *_, shell=shell: _restore(shell), always_call=True))
        try:
            yield self.model
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def without_layers(self) -> Iterator[Any]:
        """Lend the model with no decoder layers at all: embeddings, final norm and output matrix."""
        import torch  # noqa: PLC0415

        decoder, name = self.model.get_decoder(), _list_name(self.model)
        every = getattr(decoder, name)
        setattr(decoder, name, torch.nn.ModuleList())
        try:
            yield self.model
        finally:
            setattr(decoder, name, every)

    def _load(self, number: int) -> None:
        self.loader.load(self.groups[number])
        missing = [name for name, value in self.layers[number].named_parameters() if value.is_meta]
        if missing:
            raise VariantError(
                f"{self.loader.source}: doesn't fit the base: layer {number} has no tensor for {missing[0]}"
            )


@dataclass(frozen=True, slots=True)
class _Loader:
    """Loads some of a model's tensors through transformers' renaming and merging."""

    model: Any
    config: Any
    source: Path

    def load(self, tensors: Mapping[str, LazyTensor]) -> set[str]:
        """Load tensors by their names on disk; return the parameters that are still missing."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model  # noqa: PLC0415

        info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), self.config)
        if info.mismatched_keys:
            name, stored, wanted = next(iter(info.mismatched_keys))
            raise VariantError(
                f"{self.source}: doesn't fit the base: {name} has shape {list(stored)}, not {list(wanted)}"
            )
        return set(info.missing_keys)


def open_layered(
    architecture: tuple[Any, Any], tensors: Mapping[str, LazyTensor], source: Path, dtype: Any, device: str
) -> LayeredModel:
    """Build a model of an architecture (class and config) with weights `tensors`, in `dtype` on `device`.

    `source` is the directory that errors name. VariantError where the tensors don't fit the architecture.
    """
    from accelerate import init_empty_weights  # noqa: PLC0415
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
    from transformers.modeling_utils import LoadStateDictConfig  # noqa: PLC0415

    kind, config = architecture
    with init_empty_weights(include_buffers=False):
        model = kind._from_config(config, dtype=dtype).eval()  # noqa: SLF001 - as AutoModel does
    loading = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),  # noqa: SLF001 - the modules that stay in fp32
        device_map={"": device},
        weight_mapping=get_model_conversion_mapping(model),
    )
    layers = tuple(getattr(model.get_decoder(), _list_name(model)))
    groups, rest = _grouped(model, loading.weight_mapping, tensors, layers)
    loader = _Loader(model, loading, source)
    missing = loader.load(rest)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    inside = {id(value) for layer in layers for value in layer.parameters()}
    absent = [name for name, value in model.named_parameters() if value.is_meta and id(value) not in inside]
    if absent:
        raise VariantError(f"{source}: doesn't fit the base: it has no tensor for {absent[0]}")
    return LayeredModel(model, layers, groups, loader)


def _grouped(
    model: Any, mapping: Any, tensors: Mapping[str, LazyTensor], layers: tuple[Any, ...]
) -> tuple[tuple[dict[str, LazyTensor], ...], dict[str, LazyTensor]]:
    """Sort tensors by the decoder layer that they are loaded into; the second part belongs to none."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key  # noqa: PLC0415

    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = next(name for name, module in model.named_modules() if module is model.get_decoder())
    place = re.compile(rf"{re.escape(prefix)}\.{_list_name(model)}\.(\d+)\.")
    known = model.state_dict()
    groups: tuple[dict[str, LazyTensor], ...] = tuple({} for _ in layers)
    rest: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        match = place.match(renamed)
        if match is None:
            rest[name] = tensor
        elif int(match[1]) < len(layers):  # what lies beyond are layers of multi-token prediction
            groups[int(match[1])][name] = tensor
    return groups, rest


def _list_name(model: Any) -> str:
    decoder = model.get_decoder()
    found = next((name for name in _LAYER_LISTS if hasattr(decoder, name)), None)
    if found is None:
        raise VariantError(f"{type(model).__name__}: its decoder has none of {', '.join(_LAYER_LISTS)}: not supported")
    return found


def _restore(shell: list[tuple[Any, str, Any]]) -> None:
    for part, name, value in shell:
        setattr(part, name, value)
