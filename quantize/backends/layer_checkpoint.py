"""Solved modules on disk, layer by layer, so that a run that was stopped goes on where it was.

`<module>.safetensors` holds one module: the integers [N, K] uint8 that were chosen, `scale` and `zero` [N, G], `g_idx`
[K]. `layer-<n>.json` is written when layer n is whole. The dense weight is computed from these by the solver's own
formula, so a run that goes on computes what the first would have, bit for bit.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ModuleSolution:
    """What a solver found for one linear layer of N outputs and K inputs in G groups; the dense weight is [N, K]."""

    dense: Any
    scale: Any
    zero: Any
    g_idx: Any
    loss: float | str
    damp: float
    tokens: int


def dense_weight(integers: Any, scale: Any, zero: Any, g_idx: Any) -> Any:
    """Compute [N, K] fp32 as GPTQModel's quantizer does: scale * (integer - zero)."""
    groups = g_idx.long()
    return scale[:, groups] * (integers.float() - zero[:, groups])


def integers_of(solution: ModuleSolution) -> Any:
    """Find the [N, K] integers that give a solution's dense weight."""
    import torch  # noqa: PLC0415

    groups = solution.g_idx.long()
    stored = solution.dense.float() / solution.scale[:, groups] + solution.zero[:, groups]
    return stored.round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True, slots=True)
class LayerCheckpoint:
    """The folder of one run; `dtype` is that of the model's weights while it is solved."""

    folder: Path
    dtype: Any

    def completed_layers(self) -> frozenset[int]:
        """Tell which layers need no solving."""
        return frozenset(int(path.stem.removeprefix("layer-")) for path in self.folder.glob("layer-*.json"))

    def write(self, module: str, solution: ModuleSolution) -> None:
        """Keep a module's solution; the dense weight itself only where integers can't give it back exactly."""
        import torch  # noqa: PLC0415
        from safetensors.torch import save_file  # noqa: PLC0415

        integers = integers_of(solution)
        tensors = {"scale": solution.scale, "zero": solution.zero, "g_idx": solution.g_idx, "integers": integers}
        again = dense_weight(integers, solution.scale, solution.zero, solution.g_idx).to(self.dtype)
        if not torch.equal(again, solution.dense.to(self.dtype)):
            tensors["dense"] = solution.dense
        metadata = {"loss": json.dumps(solution.loss), "damp": repr(solution.damp), "tokens": str(solution.tokens)}
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path = self._path(module)
        save_file(plain, path.with_suffix(".partial"), metadata=metadata)
        path.with_suffix(".partial").rename(path)

    def read(self, module: str) -> ModuleSolution:
        """Give back what was written, with the dense weight on the CPU."""
        from safetensors import safe_open  # noqa: PLC0415

        with safe_open(self._path(module), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        scale, zero, g_idx = tensors["scale"], tensors["zero"], tensors["g_idx"]
        dense = tensors.get("dense")
        if dense is None:
            dense = dense_weight(tensors["integers"], scale, zero, g_idx).to(self.dtype)
        return ModuleSolution(
            dense, scale, zero, g_idx, json.loads(metadata["loss"]), float(metadata["damp"]), int(metadata["tokens"])
        )

    def complete(self, layer: int, modules: Sequence[str]) -> None:
        """Declare a layer whole: all of its modules are on disk."""
        path = self.folder / f"layer-{layer}.json"
        path.with_suffix(".partial").write_text(json.dumps(list(modules)))
        path.with_suffix(".partial").rename(path)

    def _path(self, module: str) -> Path:
        return self.folder / f"{module}.safetensors"
