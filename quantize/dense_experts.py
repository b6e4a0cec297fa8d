"""Experts of a transformers model with their inputs rounded, as w8a8 kernels round them."""

from collections.abc import Callable
from types import MethodType
from typing import Any

_STACKED_DIMENSIONS = 3


def round_expert_inputs(model: Any, rounded: Callable[[Any], Any]) -> None:
    """Apply `rounded` to the inputs of both products of every expert that is held in a tensor of all experts."""
    for module in model.modules():
        weight = getattr(module, "gate_up_proj", None)
        if getattr(weight, "ndim", 0) == _STACKED_DIMENSIONS:
            module.forward = MethodType(_rounded_forward(rounded), module)


def _rounded_forward(rounded: Callable[[Any], Any]) -> Callable[..., Any]:
    def forward(self: Any, hidden: Any, chosen: Any, weights: Any) -> Any:
        """`hidden [T, H]`, `chosen [T, k]` experts and their `weights [T, k]` -> `[T, H]`."""
        total = hidden.new_zeros(hidden.shape)
        for expert in chosen.unique().tolist():
            if expert >= self.num_experts:  # a place without an expert
                continue
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            inner = _product(self, "gate_up_proj", expert, rounded(hidden[tokens]))
            outer = _product(self, "down_proj", expert, rounded(self._apply_gate(inner)))
            total.index_add_(0, tokens, (outer * weights[tokens, place, None]).to(total.dtype))
        return total

    return forward


def _product(module: Any, name: str, expert: int, inputs: Any) -> Any:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias", None)
    outputs = inputs @ (weight if getattr(module, "is_transposed", False) else weight.t())
    return outputs if bias is None else outputs + bias[expert]
