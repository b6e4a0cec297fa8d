"""Experts of transformers models with their inputs rounded to int8, as w8a8 kernels round them."""

from collections.abc import Callable
from typing import Any

ROUNDED = "quantgate_int8_inputs"


def register_rounded_experts(rounded: Callable[[Any], Any]) -> None:
    """Make `rounded`, applied to the inputs of each product, an experts implementation of transformers (`ROUNDED`)."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: PLC0415

    ALL_EXPERTS_FUNCTIONS.register(ROUNDED, rounded_experts(rounded))


def rounded_experts(rounded: Callable[[Any], Any]) -> Callable[..., Any]:
    """Build the forward of a module that holds all experts of a block in 3-D tensors."""

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
    if getattr(module, "is_transposed", False):
        weight = weight.t()
    bias = getattr(module, f"{name}_bias", None)
    outputs = inputs @ weight.t()
    return outputs if bias is None else outputs + bias[expert]
