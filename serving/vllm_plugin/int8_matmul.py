"""int8 weights and activations (W8A8) on x86 CPUs where oneDNN's sums overflow, by torch's int8 kernel.

Without VNNI, oneDNN adds pairs of int8 products in 16 bits, which saturates for large weights ("Nuances of int8
computations" in its developer guide). vLLM neither halves the weights nor checks: a layer's output is 13 to 19 % off.
torch's kernel is exact, and for a single token ten times as fast.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serving.vllm_plugin.patch import Patch

if TYPE_CHECKING:
    from torch import Tensor

MOST_TOKENS_FOR_KERNEL = 32  # above, a float32 matmul of widened weights is faster than torch's int8 kernel
PROBE_INPUTS, PROBE_OUTPUTS = 64, 32
PROBE_TOLERANCE = 0.01


@dataclass(eq=False)
class Int8Matmul:
    """Replaces vLLM's int8 operators, for symmetric activations. Weights stay int8 and are not copied."""

    library: Any  # torch.library.Library; owns the registration
    layers: dict[int, tuple["Tensor", "Tensor"]] = field(default_factory=dict)
    create: Any = None  # vLLM's own operator

    def replace_operators(self) -> None:
        """Register the two operators: create the handle of a layer, and multiply with it."""
        import torch  # noqa: PLC0415

        self.create = torch.library.get_kernel("_C::create_onednn_scaled_mm_handler", "CPU")
        self.library.impl("create_onednn_scaled_mm_handler", self.create_handle, "CPU", allow_override=True)
        self.library.impl("onednn_scaled_mm", self.multiply, "CPU", allow_override=True)

    def create_handle(
        self, weight: "Tensor", scales: "Tensor", _output_type: Any, dynamic: bool, use_azp: bool, cache_size: int
    ) -> int:
        """Store `weight [K, N] int8` and `scales [N, 1] or [1]` under a handle that vLLM can release."""
        import torch  # noqa: PLC0415

        if use_azp:
            raise ValueError("asymmetric int8 activations are not supported on a CPU without VNNI")
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # noqa: SLF001
        placeholder = torch.zeros((PROBE_OUTPUTS, PROBE_INPUTS), dtype=torch.int8).t()
        unit = torch.ones((PROBE_OUTPUTS, 1), dtype=torch.float32)  # the default is bf16 while vLLM loads
        handle = int(self.create.call_boxed(keys, placeholder, unit, torch.float32, dynamic, False, cache_size))
        self.layers[handle] = (weight.t().contiguous(), scales.reshape(1, -1).float())
        return handle

    def multiply(
        self,
        output: "Tensor",
        activations: "Tensor",
        scale: "Tensor",
        _azp: Any,
        _azp_adjustment: Any,
        bias: "Tensor | None",
        handle: "Tensor",
    ) -> None:
        """Write `activations [M, K] int8 @ weight`, times both scales, into `output [M, N]`."""
        weight, weight_scale = self.layers[int(handle.item())]
        product = int8_matmul(activations, weight) * scale * weight_scale
        output.copy_(product if bias is None else product + bias)


def int8_matmul(activations: "Tensor", weight: "Tensor") -> "Tensor":
    """`[M, K] int8 @ [N, K] int8` transposed -> `[M, N]` fp32; bf16 and fp32 hold every int8 exactly."""
    import torch  # noqa: PLC0415

    if activations.shape[0] > MOST_TOKENS_FOR_KERNEL:
        return torch.nn.functional.linear(activations.float(), weight.float())
    unit = torch.ones(weight.shape[0], dtype=torch.bfloat16)
    return torch.ops.aten._weight_int8pack_mm(activations.to(torch.bfloat16), weight, unit).float()  # noqa: SLF001


def overflows() -> bool:
    """Multiply the largest int8 values with vLLM's kernel, and compare the sums with the exact ones."""
    import torch  # noqa: PLC0415

    operators = torch.ops._C  # noqa: SLF001
    # The handle does not own the weight and its scales: both must live until the product is done.
    weight = torch.full((PROBE_OUTPUTS, PROBE_INPUTS), 127, dtype=torch.int8).t()
    weight_scales = torch.ones((PROBE_OUTPUTS, 1), dtype=torch.float32)
    activations = torch.full((1, PROBE_INPUTS), 127, dtype=torch.int8)
    unit_scale = torch.ones((1, 1), dtype=torch.float32)
    handle = operators.create_onednn_scaled_mm_handler(weight, weight_scales, torch.float32, True, False, 1)
    output = torch.empty((1, PROBE_OUTPUTS), dtype=torch.float32)
    operators.onednn_scaled_mm(output, activations, unit_scale, None, None, None, torch.tensor(handle))
    operators.release_dnnl_matmul_handler(handle)
    exact = PROBE_INPUTS * 127.0 * 127.0
    return bool(((output - exact).abs() > PROBE_TOLERANCE * exact).any())


def _replace_operators() -> None:
    import torch  # noqa: PLC0415

    Int8Matmul(torch.library.Library("_C", "FRAGMENT")).replace_operators()


INT8_MATMUL = Patch("int8 matmul", "https://github.com/uxlfoundation/oneDNN/issues/717", overflows, _replace_operators)
