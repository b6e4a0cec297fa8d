"""The linear layers that GPTQ quantizes: their names in the solver, in the base's files and in the variant.

GPTQModel's module tree decides which layers these are (`quantize.backends.module_tree` reads it). It knows a family by
the names of its model in memory. A base can store the same weights otherwise: under other names (Mixtral's `w1`), two
layers in one matrix (`gate_up_proj` of Phi-3 and GLM-4), or all experts of a block in one tensor. A variant has the
names that vLLM loads: those of the base, and one set of tensors for each expert.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

Shape = tuple[int, int]  # (out_features, in_features)

# Layers that stay in the base's precision although GPTQModel could quantize them: the projections of MLA that every
# GPU holds whole, linear attention and state-space mixers, layers that predict further tokens.
_KEPT = re.compile(
    r"\.(q_a_proj|kv_a_proj_with_mqa|weights_proj|eh_proj)$|(^|\.)(linear_attn|mamba|ssm|short_conv|indexer|mtp|nextn)\."
)
# Families that store gate and up in one matrix, and whose classes in vLLM 0.32 look their quantization up by the names
# of the two (`packed_modules_mapping`); those of Phi-3 look it up by the name of the matrix.
_SPLIT_IN_VLLM = frozenset({"glm", "glm4"})
_EXPERT = re.compile(r"\.experts\.\d+\.")
_BEFORE_BLOCKS = re.compile(r"^.*?\b(?=(layers|h|blocks)\.\d+\.)")


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer as the solver sees it, [rows, columns] = [out_features, in_features].

    solver_name   its name in GPTQModel's module tree
    stored_name   the module of the variant that it is written to, alone or with the other parts of `tensor`
    tensor        the base's tensor that holds its weight
    expert        its index on the first axis of a tensor that holds all experts of a block
    part          its place among the layers that share a matrix: the first has part 0
    """

    solver_name: str
    stored_name: str
    tensor: str
    rows: int
    columns: int
    expert: int | None = None
    part: int | None = None

    @property
    def is_expert(self) -> bool:
        """Whether a router decides which tokens it sees."""
        return is_expert(self.solver_name)


@dataclass(frozen=True)
class ModuleTree:
    """All layers of a base that can be quantized, in the solver's order.

    `kept` are layers (solver's names) of GPTQModel's tree that are never quantized. `definition` names its class.
    """

    layers: tuple[LinearLayer, ...]
    kept: tuple[str, ...] = ()
    definition: str = ""

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The variant's modules with their shapes."""
        shapes: dict[str, Shape] = {}
        for layer in self.layers:
            rows, _ = shapes.get(layer.stored_name, (0, 0))
            shapes[layer.stored_name] = (rows + layer.rows, layer.columns)
        return shapes

    @cached_property
    def members(self) -> dict[str, tuple[LinearLayer, ...]]:
        """The layers of each of the variant's modules, in the order in which they are stacked."""
        members: dict[str, list[LinearLayer]] = {}
        for layer in self.layers:
            members.setdefault(layer.stored_name, []).append(layer)
        return {name: tuple(sorted(layers, key=lambda layer: layer.part or 0)) for name, layers in members.items()}

    @cached_property
    def stored_in(self) -> dict[str, tuple[str, ...]]:
        """The variant's modules that come from each tensor of the base."""
        found: dict[str, dict[str, None]] = {}
        for layer in self.layers:
            found.setdefault(layer.tensor, {})[layer.stored_name] = None
        return {tensor: tuple(names) for tensor, names in found.items()}

    @property
    def has_experts(self) -> bool:
        """Whether routers choose between some of the layers."""
        return any(layer.is_expert for layer in self.layers)

    def as_json(self) -> dict[str, Any]:
        """Give plain data for a job file."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "kept": list(self.kept),
            "definition": self.definition,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ModuleTree":
        """Read what `as_json` gave."""
        layers = tuple(LinearLayer(**row) for row in value["layers"])
        return cls(layers, tuple(value["kept"]), value["definition"])


def is_expert(name: str) -> bool:
    """Tell a routed expert's layer by its name; shared experts see every token and are none."""
    return _EXPERT.search(name) is not None


def is_kept(solver_name: str) -> bool:
    """Tell whether a layer is never quantized, whatever GPTQModel's tree says of it."""
    return _KEPT.search(solver_name) is not None


def stored_name(solver_name: str, tensor: str, expert: int | None, part: int | None = None, family: str = "") -> str:
    """Name the variant's module for a layer, as vLLM loads it.

    It is the base's own name, except for a tensor of all experts (one name for each), and for a part of a matrix that
    vLLM knows by its parts.
    """
    module = tensor.removesuffix(".weight")
    parent, leaf = module.rpartition(".")[0], solver_name.rpartition(".")[2]
    if expert is not None:
        return f"{parent}.{expert}.{leaf}"
    return f"{parent}.{leaf}" if part is not None and family in _SPLIT_IN_VLLM else module


def direct_tree(shapes: Mapping[str, Shape]) -> ModuleTree:
    """The tree of a base whose files have the solver's names."""
    return ModuleTree(
        tuple(LinearLayer(name, name, f"{name}.weight", rows, columns) for name, (rows, columns) in shapes.items())
    )


def inside_blocks(name: str) -> str:
    """Cut off what stands before the blocks: a multimodal model has other prefixes on disk than in memory."""
    return _BEFORE_BLOCKS.sub("", name)
