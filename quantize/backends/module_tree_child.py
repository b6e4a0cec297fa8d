"""Lists what GPTQModel would quantize of a base, `python -m quantize.backends.module_tree_child`.

The base is built on the meta device: seconds, whatever its size, for only the headers of its files are read.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantize.errors import RecipeError
from quantize.modules import LinearLayer, ModuleTree, is_kept, stored_name
from quantize.running.worker import WorkerChannel, run_child


def read_tree(base: Path, scratch: Path) -> ModuleTree:
    """Build a base on the meta device and list its layers; RecipeError for a family that can't be loaded."""
    from gptqmodel import QuantizeConfig  # noqa: PLC0415

    config = QuantizeConfig(offload_to_disk=True, offload_to_disk_path=str(scratch))
    return tree_of(load_definition(base, config, device="cpu"))


def load_definition(base: Path, config: Any, **options: Any) -> Any:
    """Load a base for GPTQModel; RecipeError for a family that can't be loaded."""
    from gptqmodel import GPTQModel  # noqa: PLC0415
    from gptqmodel.models.auto import check_and_get_model_definition  # noqa: PLC0415

    try:
        _mend(check_and_get_model_definition(str(base)))
        return GPTQModel.load(str(base), config, **options)
    except (ValueError, ImportError, KeyError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RecipeError(f"{base}: GPTQModel can't load this model: {reason}") from error


def _mend(definition: Any) -> None:
    """Mend what GPTQModel 7.6 and defuser 0.0.28 have wrong for text that is tokenized already.

    Multimodal definitions ask for an image processor, also for text. Mistral 3 has the names on disk that Gemma 3 has,
    but for a level of its vision tower. defuser's own block for GLM-4 MoE expects another router than that of
    transformers 5.19; its general way to split experts works.
    """
    from defuser.model_registry import MODEL_CONFIG, PATCH  # noqa: PLC0415
    from gptqmodel.models.base import BaseQModel  # noqa: PLC0415
    from gptqmodel.models.definitions.gemma3 import Gemma3ForConditionalGenerationGPTQ as Gemma3  # noqa: PLC0415
    from gptqmodel.models.definitions.mistral3 import Mistral3GPTQ  # noqa: PLC0415

    definition.require_load_processor = False
    definition.prepare_dataset = BaseQModel.prepare_dataset
    Mistral3GPTQ.HF_CONVERSION_MAP_REVERSED = Gemma3.HF_CONVERSION_MAP_REVERSED[1:]
    for family in ("glm4_moe", "glm4_moe_lite"):
        MODEL_CONFIG[family].pop(PATCH.REPLACE_MODULE, None)


def tree_of(model: Any) -> ModuleTree:
    """List the layers of a loaded definition, each with the tensor of the base that holds it."""
    found = dict(_listed(model))
    family = str(model.model.config.model_type)
    layers: list[LinearLayer] = []
    for name, (rows, columns) in found.items():
        if is_kept(name):
            continue
        tensor, expert, part = _source(model, name)
        layers.append(
            LinearLayer(name, stored_name(name, tensor, expert, part, family), tensor, rows, columns, expert, part)
        )
    kept = tuple(name for name in found if is_kept(name))
    return ModuleTree(tuple(layers), kept, type(model).__name__)


def names_of(model: Any) -> list[str]:
    """Name the layers that a loaded definition would quantize without any rule."""
    return [name for name, _ in _listed(model)]


def _source(model: Any, name: str) -> tuple[str, int | None, int | None]:
    """Find the base's tensor of a layer, the expert's index in it, and the layer's place among its parts."""
    tensor, expert, part, _ = model.turtle_model._resolve_checkpoint_tensor_source(name, "weight")  # noqa: SLF001
    if tensor is None:
        raise RecipeError(f"{model.model_local_path}: has no weight for {name}; is a shard missing?")
    return tensor, expert, part


def _listed(model: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name and shape of each linear layer of GPTQModel's tree that the model has."""
    # Without rules: those of a scheme or of this package come later.
    relative = [name for block in model.simple_layer_modules(model.model.config, None) for name in block]
    modules = dict(model.model.named_modules())
    for root in model.extract_layers_node():
        for number in range(len(modules.get(root, ()))):
            for name in relative:
                full = f"{root}.{number}.{name}"
                weight = getattr(modules.get(full), "weight", None)
                if weight is not None and weight.dim() == 2:
                    yield full, (int(weight.shape[0]), int(weight.shape[1]))


def list_modules(job: dict[str, Any], _: WorkerChannel) -> dict[str, Any]:
    """Child's work: `{base, scratch}` -> the module tree as JSON."""
    return read_tree(Path(job["base"]), Path(job["scratch"])).as_json()


if __name__ == "__main__":
    sys.exit(run_child(list_modules))
