"""What is wrong in vLLM's CPU engine, mended: vLLM loads this as a plugin, in its own processes only.

Two things go wrong with vLLM 0.32 on x86 CPUs that lack AVX-512, both after a start that looks fine:

* int4: its build for AVX2 has no `cpu_gemm_wna16`, so GPTQ int4 dies at the first token. torch has an int4 product
  that knows AVX2; `Int4Product` puts it in the gap.
* int8: without VNNI, oneDNN adds pairs of products in 16 bits, which overflows for large weights: 13 to 19 % error
  in a layer's output, and nonsense for text. `Int8Product` uses torch's product instead, which is right, and ten
  times as fast for a single token.

And two on every CPU:

* a request with a `seed` whose prompt is longer than one batch ends the whole engine, because vLLM turns its generator
  back by an offset that only CUDA's generators have; see `rewindable`.
* vLLM's processes wait for one another by calling `sched_yield` without a pause, for a second after each message.
  Under Linux 6.18, the only one tried, whatever else wants that core gets next to nothing: beside one busy replica
  another process got 0.2 to 1 % of a shared core, and of two busy replicas one made no token in ten seconds. So they
  take a nap instead; see `nap`.

Where vLLM's own code is there and right, nothing is touched.
"""

import time
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

# vllm/csrc/cpu/torch_bindings.cpp: the operator as the AVX-512 builds define it.
INT4_SCHEMA = (
    "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a!) output, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int pack_factor, str isa_hint) -> ()"
)
OUTPUT_BLOCK = 16  # vLLM stores the weights of 16 output channels together
VALUES_PER_WORD = 8
GROUP_SIZES = (256, 128, 64, 32)  # what torch's int4 kernel takes
FEW_TOKENS = 32  # up to here torch's int8 kernel beats widening the weights first
PROBE_INPUTS, PROBE_OUTPUTS = 64, 32
PROBE_TOLERANCE = 0.01
# An engine's step takes milliseconds: alone on two cores a replica of SmolLM2-135M is up to a tenth slower with 50 us.
NAP_SECONDS = 50e-6
WAITING_FOR_A_PROCESS = "vllm.distributed.device_communicators.shm_broadcast"


def register() -> None:
    """Mend what this CPU gets wrong; vLLM calls it through the entry-point group `vllm.general_plugins`."""
    import torch  # noqa: PLC0415 - runs inside vLLM, which has it loaded

    # Loads vLLM's own operators, which may come before or after its plugins otherwise.
    torch.ops.import_module("vllm._custom_ops")
    operators = torch.ops._C  # noqa: SLF001
    if not hasattr(operators, "onednn_scaled_mm"):
        return  # no CPU build of vLLM
    torch.Generator = rewindable(torch.Generator)
    import_module(WAITING_FOR_A_PROCESS).__dict__["sched_yield"] = nap
    library = torch.library.Library("_C", "FRAGMENT")
    if not hasattr(operators, "cpu_gemm_wna16"):
        library.define(INT4_SCHEMA)
        library.impl("cpu_gemm_wna16", Int4Product(library), "CPU")
    if overflows(operators):
        Int8Product(library).take_over()


@dataclass(eq=False)
class Int4Product:
    """The operator; repacks every weight once, when it is first used. Holding `library` keeps it defined."""

    library: Any
    packed: dict[int, tuple[Any, Any, int]] = field(default_factory=dict)

    def __call__(
        self, given: Any, q_weight: Any, output: Any, scales: Any, zeros: Any, bias: Any, _pack: int, _isa: str
    ) -> None:
        """Write `given [M, K] @ dequantized(q_weight)` into `output [M, N]`."""
        import torch  # noqa: PLC0415

        if zeros is not None:
            raise ValueError("asymmetric int4 needs a CPU with AVX-512; quantize with sym: true")
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
    raise ValueError(f"int4 with groups of {wanted} needs a CPU with AVX-512; use group size 32, 64 or 128")


def overflows(operators: Any) -> bool:
    """Multiply the largest int8 values there are with vLLM's kernel, and see whether the sum is right."""
    import torch  # noqa: PLC0415

    weight = torch.full((PROBE_INPUTS, PROBE_OUTPUTS), 127, dtype=torch.int8)
    given = torch.full((1, PROBE_INPUTS), 127, dtype=torch.int8)
    one = torch.ones((1, 1), dtype=torch.float32)
    handle = operators.create_onednn_scaled_mm_handler(
        weight.t().contiguous().t(), torch.ones((PROBE_OUTPUTS, 1), dtype=torch.float32), torch.float32, True, False, 1
    )
    output = torch.empty((1, PROBE_OUTPUTS), dtype=torch.float32)
    operators.onednn_scaled_mm(output, given, one, None, None, None, torch.tensor(handle))
    operators.release_dnnl_matmul_handler(handle)
    exact = PROBE_INPUTS * 127.0 * 127.0
    return bool(((output - exact).abs() > PROBE_TOLERANCE * exact).any())


@dataclass(eq=False)
class Int8Product:
    """Stands before vLLM's int8 operators; symmetric activations only. Weights stay int8, and are not copied."""

    library: Any
    layers: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    create: Any = None

    def take_over(self) -> None:
        """Replace the operators that make a layer's handle and multiply with it."""
        import torch  # noqa: PLC0415

        self.create = torch.library.get_kernel("_C::create_onednn_scaled_mm_handler", "CPU")
        self.library.impl("create_onednn_scaled_mm_handler", self.remember, "CPU", allow_override=True)
        self.library.impl("onednn_scaled_mm", self.multiply, "CPU", allow_override=True)

    def remember(self, weight: Any, scales: Any, _type: Any, dynamic: bool, use_azp: bool, cache_size: int) -> int:
        """Keep `weight [K, N] int8` and `scales [N, 1] or [1]` under a handle that vLLM can release."""
        import torch  # noqa: PLC0415

        if use_azp:
            raise ValueError("asymmetric int8 activations need a CPU with VNNI")
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # noqa: SLF001
        stand_in = torch.zeros((PROBE_OUTPUTS, PROBE_INPUTS), dtype=torch.int8).t()
        unit = torch.ones((PROBE_OUTPUTS, 1), dtype=torch.float32)  # the default is bf16 while vLLM loads
        handle = int(self.create.call_boxed(keys, stand_in, unit, torch.float32, dynamic, False, cache_size))
        self.layers[handle] = (weight.t().contiguous(), scales.reshape(1, -1).float())
        return handle

    def multiply(
        self, output: Any, given: Any, scale: Any, _azp: Any, _azp_adjustment: Any, bias: Any, handle: Any
    ) -> None:
        """Write `given [M, K] int8 @ weight`, times both scales, into `output [M, N]`."""
        weight, weight_scale = self.layers[handle.item()]
        total = int8_product(given, weight) * scale * weight_scale
        output.copy_(total if bias is None else total + bias)


def int8_product(given: Any, weight: Any) -> Any:
    """`[M, K] int8 @ [N, K] int8` transposed -> `[M, N]` fp32; bf16 and fp32 hold every int8 exactly."""
    import torch  # noqa: PLC0415

    if given.shape[0] > FEW_TOKENS:
        return torch.nn.functional.linear(given.float(), weight.float())
    unit = torch.ones(weight.shape[0], dtype=torch.bfloat16)
    return torch.ops.aten._weight_int8pack_mm(given.to(torch.bfloat16), weight, unit).float()  # noqa: SLF001


def nap() -> None:
    """Leave the core to others for a moment, while another process of the engine works."""
    time.sleep(NAP_SECONDS)


def rewindable(kind: Any) -> Any:
    """A generator class whose CPU instances can be turned back, as vLLM does for each part of a prompt but the last.

    vLLM draws a number after each part and throws it away (gpu_model_runner.py, `_bookkeeping_sync`), so before the
    first token that counts, turning back means to start again from the seed: the answer doesn't depend on how the
    prompt was cut. A request that was preempted in the middle of its answer starts again from the seed, too.
    """

    class Lookalike(type(kind)):  # type: ignore[misc]
        """Takes torch's own generators for its instances, so that the class can stand in for theirs."""

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, kind)

    class RewindableGenerator(kind, metaclass=Lookalike):  # type: ignore[misc]
        """torch.Generator with the two methods that it lacks on a CPU."""

        def get_offset(self) -> int:
            return 0 if self.device.type == "cpu" else int(super().get_offset())

        def set_offset(self, offset: int) -> None:
            if self.device.type == "cpu":
                self.manual_seed(self.initial_seed())
            else:
                super().set_offset(offset)

    return RewindableGenerator
