"""Which layers of a base are quantized: read from its files for plain families, else from GPTQModel's module tree."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from quantize.base import BaseModel
from quantize.modules import ModuleTree, direct_tree
from quantize.running.worker import run_worker

_CHILD = "quantize.backends.module_tree_child"

# Families whose files have the solver's names and nothing else in their blocks, so that the headers tell the same as
# the module tree (tests/quantize/test_families.py compares them). Reading the tree takes ten seconds.
PLAIN_FAMILIES = frozenset(
    {
        "cohere2",
        "ernie4_5",
        "exaone4",
        "gemma2",
        "gemma3_text",
        "granite",
        "hunyuan_v1_dense",
        "llama",
        "ministral3",
        "mistral",
        "olmo2",
        "olmo3",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
    }
)
_PLAIN_LAYER = re.compile(r"^model\.layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)$")


def with_module_tree(base: BaseModel, environ: Mapping[str, str]) -> BaseModel:
    """Give a base the layers that GPTQ quantizes; RecipeError for a model that GPTQModel can't load."""
    tree = direct_tree(base.shapes) if is_plain(base) else read_module_tree(base.directory, environ)
    return replace(base, shapes=tree.shapes, tree=tree)


def is_plain(base: BaseModel) -> bool:
    """Tell whether the headers of a base's files say which layers are quantized."""
    if base.config.get("model_type") not in PLAIN_FAMILIES:
        return False
    blocks = base.config.get("num_hidden_layers")
    matches = [_PLAIN_LAYER.match(name) for name in base.shapes]
    return all(match is not None and (blocks is None or int(match[1]) < blocks) for match in matches)


def read_module_tree(base: Path, environ: Mapping[str, str]) -> ModuleTree:
    """Ask GPTQModel, in a child process; the base's weights are not read."""
    with TemporaryDirectory(prefix="quantgate-") as folder:
        job = {"base": str(base.resolve()), "scratch": str(Path(folder, "offloaded"))}
        tree = run_worker(_CHILD, job, folder=Path(folder), environ=environ, on_progress=lambda *_: None)
    return ModuleTree.from_json(tree)
