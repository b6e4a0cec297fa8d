"""Orthogonal matrices in the residual stream (R1) and between values and outputs of each head (R2), in the weights.

As in SpinQuant (arXiv 2405.16406) and QuaRot (arXiv 2404.00456), without their online rotations R3 and R4, so that
every engine runs the result. Rows are tokens: a rotated state is x' = x R. A layer that reads it has the weight W R, a
layer that writes it R^T W and, if any, the bias b R. RMSNorm commutes with R once its weights are multiplied into the
layers that read it, because R keeps lengths.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantize.transforms.layout import EMBEDDINGS, LM_HEAD, Layout


@dataclass(frozen=True, slots=True)
class Rotation:
    """What is rotated: R1 [H, H] of the residual stream, R2 [layer, KV head, D, D]; None for what stays."""

    residual: Any = None
    heads: Any = None


def rotation_of(layout: Layout, *, residual: bool, heads: bool, seed: int) -> Rotation:
    """Draw the matrices of a model; equal arguments give equal ones."""
    import torch  # noqa: PLC0415

    generator = torch.Generator().manual_seed(seed)
    r1 = orthogonal(layout.hidden_size, generator) if residual else None
    count, size = layout.layers * layout.kv_heads, layout.head_dim
    r2 = torch.stack([orthogonal(size, generator) for _ in range(count)]) if heads else None
    return Rotation(r1, None if r2 is None else r2.reshape(layout.layers, layout.kv_heads, size, size))


def orthogonal(size: int, generator: Any) -> Any:
    """Draw an orthogonal [size, size] in fp64: Hadamard with random signs, times a random one for the odd factor.

    Hadamard spreads every input evenly; it exists for powers of two. 576 is 64 x 9: H64 (x) Q9.
    """
    import torch  # noqa: PLC0415

    power = size & -size
    odd = size // power
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < power:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    mixed, triangle = torch.linalg.qr(torch.randn(odd, odd, dtype=torch.float64, generator=generator))
    mixed = (mixed * triangle.diagonal().sign()).contiguous()  # kron takes no other layout
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2.0 - 1.0
    return signs * torch.kron(hadamard / power**0.5, mixed)


def rotated(tensors: Mapping[str, Any], layout: Layout, rotation: Rotation) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a rotated model by name, in fp32 where they changed; `tensors` read with `[...]`."""
    edits = _Edits(tensors, layout, rotation)
    for name, tensor in tensors.items():
        edit = edits.of(name)
        if name == LM_HEAD and layout.tied and rotation.residual is not None:
            continue
        yield name, tensor[...] if edit is None else edit(tensor[...].double()).float()
    if layout.tied and rotation.residual is not None:
        yield LM_HEAD, edits.output_matrix(tensors[EMBEDDINGS][...].double()).float()


@dataclass(frozen=True, slots=True)
class _Edits:
    """What happens to each tensor of a model."""

    tensors: Mapping[str, Any]
    layout: Layout
    rotation: Rotation

    def of(self, name: str) -> Callable[[Any], Any] | None:
        """Find the change of a tensor by its name; None for a tensor that stays as it is."""
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            return self._in_block(int(parts[2]), parts[-2], parts[-1])
        if self.rotation.residual is None:
            return None
        whole: dict[str, Callable[[Any], Any]] = {
            EMBEDDINGS: lambda weight: weight @ self.rotation.residual,
            "model.norm.weight": lambda weight: weight.new_ones(weight.shape),
            LM_HEAD: self.output_matrix,
        }
        return whole.get(name)

    def output_matrix(self, weight: Any) -> Any:
        """Multiply the last norm's weights into the output matrix, and let it read rotated states."""
        return self._reading(weight, "model.norm.weight")

    def _in_block(self, layer: int, module: str, kind: str) -> Callable[[Any], Any] | None:
        r1, r2 = self.rotation.residual, self.rotation.heads
        prefix = f"model.layers.{layer}"
        steps: list[Callable[[Any], Any]] = []
        if r1 is not None and module in ("input_layernorm", "post_attention_layernorm"):
            steps.append(lambda weight: weight.new_ones(weight.shape))
        if r1 is not None and kind == "weight" and module in ("q_proj", "k_proj", "v_proj"):
            steps.append(lambda weight: self._reading(weight, f"{prefix}.input_layernorm.weight"))
        if r1 is not None and kind == "weight" and module in ("gate_proj", "up_proj"):
            steps.append(lambda weight: self._reading(weight, f"{prefix}.post_attention_layernorm.weight"))
        if r1 is not None and module in ("o_proj", "down_proj"):
            steps.append(lambda value: r1.T @ value)  # a bias b R is R^T b
        if r2 is not None and module == "v_proj":
            steps.append(lambda value: head_rows(value, r2[layer]))
        if r2 is not None and module == "o_proj" and kind == "weight":
            steps.append(lambda weight: head_columns(weight, r2[layer], self.layout.heads))
        return _composed(steps) if steps else None

    def _reading(self, weight: Any, norm: str) -> Any:
        return (weight * self.tensors[norm][...].double()) @ self.rotation.residual


def head_rows(value: Any, rotations: Any) -> Any:
    """Rotate the outputs of each KV head: the rows of a weight [KV * D, K], or a bias [KV * D]."""
    count, size, _ = rotations.shape
    return (rotations.transpose(1, 2) @ value.reshape(count, size, -1)).reshape(value.shape)


def head_columns(weight: Any, rotations: Any, heads: int) -> Any:
    """Let a weight [N, heads * D] read rotated values; heads that share a KV head read the same."""
    count, size, _ = rotations.shape
    each = rotations.repeat_interleave(heads // count, 0)
    return (weight.reshape(-1, heads, 1, size) @ each).reshape(weight.shape)


def _composed(steps: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def applied(value: Any) -> Any:
        for step in steps:
            value = step(value)
        return value

    return applied
