"""GPTQ int4 on x86 CPUs without AVX-512, by torch's int4 kernel.

vLLM's build for AVX2 has no `cpu_gemm_wna16`, but still chooses the kernel that calls it, so int4 fails at the first
token. torch's kernel runs on AVX2.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serving.vllm_plugin.patch import Patch

if TYPE_CHECKING:
    from torch import Tensor

# vllm/csrc/cpu/torch_bindings.cpp: the operator as the builds for AVX-512 define it.
SCHEMA = (
    "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a!) output, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int pack_factor, str isa_hint) -> ()"
)
OUTPUT_BLOCK = 16  # vLLM stores the weights of 16 output channels together
VALUES_PER_WORD = 8
GROUP_SIZES = (256, 128, 64, 32)  # supported by torch's kernel


@dataclass(eq=False)
class Int4Matmul:
    """The operator; repacks each weight at its first use. Keep `library` alive: it owns the registration."""

    library: Any  # torch.library.Library
    packed: dict[int, tuple["Tensor", "Tensor", int]] = field(default_factory=dict)

    def __call__(
        self,
        activations: "Tensor",
        q_weight: "Tensor",
        output: "Tensor",
        scales: "Tensor",
        zeros: "Tensor | None",
        bias: "Tensor | None",
        _pack_factor: int,
        _isa_hint: str,
    ) -> None:
        """Write `activations [M, K] @ dequantized(q_weight)` into `output [M, N]`; ValueError for zero points."""
        import torch  # noqa: PLC0415

        if zeros is not None:
            raise ValueError("asymmetric int4 is not supported on a CPU without AVX-512; quantize with sym: true")
        key = q_weight.data_ptr()
        if key not in self.packed:
            self.packed[key] = repack(q_weight, scales)
        weight, scales_and_zeros, group_size = self.packed[key]
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(  # noqa: SLF001
            activations.to(torch.bfloat16).contiguous(), weight, group_size, scales_and_zeros
        )
        output.copy_(product if bias is None else product + bias)


def repack(q_weight: "Tensor", scales: "Tensor") -> tuple["Tensor", "Tensor", int]:
    """Convert vLLM's blocks `[N/16, K*2] int32` and scales `[G, N]` to torch's weight, scales and group size."""
    import torch  # noqa: PLC0415

    values = unpack_blocks(q_weight)
    group_size, repeats = torch_groups(values.shape[1], scales.shape[0])
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.contiguous(), 1)  # noqa: SLF001
    group_scales = scales.to(torch.bfloat16).repeat_interleave(repeats, dim=0)
    # torch computes (value - 8) * scale + zero: GPTQ's symmetric form with zero = 0.
    return packed, torch.stack([group_scales, torch.zeros_like(group_scales)], dim=2).contiguous(), group_size


def unpack_blocks(q_weight: "Tensor") -> "Tensor":
    """Undo vLLM's blocks: `[N/16, K*2] int32`, eight 4-bit values a word -> `[N, K] int32` of 0..15."""
    import torch  # noqa: PLC0415

    blocks = q_weight.shape[0]
    words = q_weight.reshape(blocks, -1, OUTPUT_BLOCK // VALUES_PER_WORD)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    values = (words.unsqueeze(-1) >> shifts) & 0xF
    return values.reshape(blocks, words.shape[1], OUTPUT_BLOCK).permute(0, 2, 1).reshape(blocks * OUTPUT_BLOCK, -1)


def torch_groups(inputs: int, groups: int) -> tuple[int, int]:
    """Choose the group size for torch's kernel, and how often each scale is repeated for it.

    A group size that torch doesn't support, such as a whole channel, is split into equal parts of one that it does.
    ValueError if there is none.
    """
    wanted = inputs // groups
    for size in GROUP_SIZES:
        if wanted % size == 0:
            return size, wanted // size
    raise ValueError(
        f"int4 with group size {wanted} is not supported on a CPU without AVX-512; use group size 32, 64 or 128"
    )


def _is_missing() -> bool:
    import torch  # noqa: PLC0415

    return not hasattr(torch.ops._C, "cpu_gemm_wna16")  # noqa: SLF001


def _define_operator() -> None:
    import torch  # noqa: PLC0415

    library = torch.library.Library("_C", "FRAGMENT")
    library.define(SCHEMA)
    library.impl("cpu_gemm_wna16", Int4Matmul(library), "CPU")


INT4_MATMUL = Patch("int4 matmul", "https://github.com/vllm-project/vllm/issues/55613", _is_missing, _define_operator)
