"""An int4 matrix product for CPUs without AVX-512, which vLLM loads as a plugin.

vLLM 0.32 brings its CPU kernels in three builds; the one for AVX2 lacks `cpu_gemm_wna16`, so GPTQ int4 loads there
and dies at the first token. torch has an int4 product of its own that knows AVX2: this puts it in the gap. It is
registered through the entry-point group `vllm.general_plugins`, in vLLM's processes only.
"""

from dataclasses import dataclass, field
from typing import Any

# vllm/csrc/cpu: the operator as the AVX-512 builds define it.
SCHEMA = (
    "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a!) output, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int pack_factor, str isa_hint) -> ()"
)
OUTPUT_BLOCK = 16  # vLLM stores the weights of 16 output channels together
VALUES_PER_WORD = 8
GROUP_SIZES = (256, 128, 64, 32)  # what torch's kernel takes


def register() -> None:
    """Define the missing operator; does nothing where vLLM's own build has it."""
    import torch  # noqa: PLC0415 - runs inside vLLM, which has it loaded

    if torch.cpu._is_avx512_supported() or hasattr(torch.ops._C, "cpu_gemm_wna16"):  # noqa: SLF001
        return
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(SCHEMA)
    library.impl("cpu_gemm_wna16", Int4Product(library), "CPU")


@dataclass(eq=False)
class Int4Product:
    """The operator; repacks every weight once, when it is first used. Keeps `library` alive, which keeps it defined."""

    library: Any
    packed: dict[int, tuple[Any, Any, int]] = field(default_factory=dict)

    def __call__(
        self, given: Any, q_weight: Any, output: Any, scales: Any, zeros: Any, bias: Any, _pack: int, _isa: str
    ) -> None:
        """Write `given [M, K] @ dequantized(q_weight)` into `output [M, N]`."""
        import torch  # noqa: PLC0415

        if zeros is not None:
            raise NotImplementedError("asymmetric int4 needs a CPU with AVX-512; quantize with sym: true")
        key = q_weight.data_ptr()
        if key not in self.packed:
            self.packed[key] = repacked(q_weight, scales)
        weight, scales_and_zeros, group_size = self.packed[key]
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(  # noqa: SLF001
            given.to(torch.bfloat16).contiguous(), weight, group_size, scales_and_zeros
        )
        output.copy_(product if bias is None else product + bias)


def repacked(q_weight: Any, scales: Any) -> tuple[Any, Any, int]:
    """Turn vLLM's blocks `[N/16, K*2] int32` with scales `[G, N]` into torch's packed weight, scales and group size."""
    import torch  # noqa: PLC0415

    values = unblocked(q_weight)
    group_size, repeats = torch_groups(values.shape[1], scales.shape[0])
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.contiguous(), 1)  # noqa: SLF001
    spread = scales.to(torch.bfloat16).repeat_interleave(repeats, dim=0)
    # torch computes (value - 8) * scale + zero, which is GPTQ's symmetric form with zero = 0.
    return packed, torch.stack([spread, torch.zeros_like(spread)], dim=2).contiguous(), group_size


def unblocked(q_weight: Any) -> Any:
    """Undo vLLM's blocking: `[N/16, K*2] int32`, eight 4-bit values a word -> `[N, K] int32` of 0..15."""
    import torch  # noqa: PLC0415

    blocks = q_weight.shape[0]
    words = q_weight.reshape(blocks, -1, OUTPUT_BLOCK // VALUES_PER_WORD)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    values = (words.unsqueeze(-1) >> shifts) & 0xF
    return values.reshape(blocks, words.shape[1], OUTPUT_BLOCK).permute(0, 2, 1).reshape(blocks * OUTPUT_BLOCK, -1)


def torch_groups(inputs: int, groups: int) -> tuple[int, int]:
    """Choose the group size for torch's kernel, and how often each scale is repeated for it.

    A group that torch doesn't know (a whole channel, say) is cut into equal ones that it does.
    """
    wanted = inputs // groups
    for size in GROUP_SIZES:
        if wanted % size == 0:
            return size, wanted // size
    raise NotImplementedError(f"int4 with groups of {wanted} needs a CPU with AVX-512; use group size 32, 64 or 128")
