"""What the tested vLLM, 0.32 and 0.33, loads: one table of weight formats by engine, and KV cache dtypes.

`quantize --plan`, lint, preflight and doctor ask this module; it imports nothing of vLLM and does no I/O. Each row has
the source that it was read from, below `vllm/model_executor/`; `tests/contract/test_formats.py` loads a tiny model of
every row in the installed vLLM for CPU.

On CUDA, `capability` is the lowest compute capability that vLLM accepts (75: Turing, 80: Ampere, 89: Ada). On CPU,
`flags` are instruction sets (names of /proc/cpuinfo) of which a machine needs one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from config.quantization import (
    COMPRESSED_TENSORS,
    REORDERING,
    UNQUANTIZED_BITS,
    Compression,
    QuantizationArgs,
    QuantizationScheme,
    Strategy,
)

Engine = Literal["cpu", "cuda"]
KvCacheDtype = Literal["auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"]
Inputs = Literal["none", "int8", "fp8", "fp4"]

ENGINES: tuple[Engine, ...] = ("cuda", "cpu")
# utils/marlin_utils.py, MARLIN_SUPPORTED_GROUP_SIZES; -1: one scale for all inputs of an output.
GPTQ_GROUPS = (-1, 32, 64, 128)
GPTQ_BITS = (4, 8)
# mixed_precision/triton_w4a16.py, TRITON_W4A16_SUPPORTED_GROUP_SIZES: beside Marlin, for 4 bits.
_PACKED_GROUPS = (-1, 32, 64, 128, 256)
_ANY_GROUP: tuple[int, ...] = ()
# kernels/linear/mixed_precision/cpu.py: CPUWNA16 wants inputs and outputs of a rank in multiples of this.
CPU_TILE = 32
# kernels/linear/scaled_mm: torch._scaled_mm and CUTLASS want both sides of an FP8 matrix in multiples of this.
FP8_TILE = 16
AMX = "amx_tile"
# layers/fused_moe/oracle: CPU kernels for experts in int4 and int8.
CPU_EXPERT_FLAG = AMX
# Linear layers of a block that every rank has as a whole (models/: ReplicatedLinear): routers, gates of shared experts,
# and the down-projections of latent attention. The first two are never quantized.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
REPLICATED = ROUTERS | {"kv_a_proj_with_mqa", "q_a_proj", "fused_qkv_a_proj"}
# v1/attention/backends/cpu_attn.py, _get_attn_isa: on x86 an FP8 KV cache needs one of these.
CPU_FP8_KV_CACHE_FLAGS = frozenset({"avx512f", AMX})


@dataclass(frozen=True, slots=True)
class Support:
    """Layers of one format that an engine loads: those of any of these values.

    `groups` are inputs with a common scale (-1: all of them; empty: any number).
    """

    compression: Compression
    engine: Engine
    bits: tuple[int, ...]
    kernels: str
    source: str
    strategies: tuple[Strategy, ...] = ("channel", "group")
    groups: tuple[int, ...] = _ANY_GROUP
    symmetric: tuple[bool, ...] = (True,)
    inputs: tuple[Inputs, ...] = ("none",)
    capability: int = 75
    flags: frozenset[str] = frozenset()


_WNA16 = "layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py"
_W8A8_INT8 = "layers/quantization/compressed_tensors/schemes/compressed_tensors_w8a8_int8.py"
_W8A8_FP8 = "layers/quantization/compressed_tensors/schemes/compressed_tensors_w8a8_fp8.py"
_GPTQ = "layers/quantization/auto_gptq.py"
_AWQ = "layers/quantization/auto_awq.py"
_FP8 = "layers/quantization/fp8.py"
_MODELOPT = "layers/quantization/modelopt.py"
_WHOLE: tuple[Strategy, ...] = ("tensor", "channel")
_WHOLE_OR_BLOCK: tuple[Strategy, ...] = ("tensor", "channel", "block")
_BOTH = (True, False)
# cpu_gemm_wna16 is built for AVX-512. Without it, quantgate's plugin computes symmetric weights (serving/vllm_plugin).
_AVX512 = frozenset({"avx512f"})
_INTEGERS = "Machete on Hopper, else Marlin"
_CPU_INTEGERS = "CPUWNA16"
_CUTLASS_INT8 = "CUTLASS or Triton int8"
_CPU_INT8 = "CPUInt8ScaledMM"
_CUDA_FP8 = "CUTLASS FP8 from Ada on, else Marlin"
_CPU_FP8 = "torch._scaled_mm, or AMX-FP8"
_NVFP4 = "FP4 of Blackwell, else Marlin"

# bitsandbytes has no row: vLLM 0.32 has no such method (layers/quantization/__init__.py, QUANTIZATION_METHODS).
SUPPORTED: tuple[Support, ...] = (
    Support("gptq", "cuda", (4, 8), _INTEGERS, _GPTQ, groups=GPTQ_GROUPS),
    Support("gptq", "cpu", (4,), _CPU_INTEGERS, _GPTQ, groups=GPTQ_GROUPS),
    Support("awq", "cuda", (4,), _INTEGERS, _AWQ, groups=GPTQ_GROUPS, symmetric=_BOTH),
    Support("awq", "cpu", (4,), _CPU_INTEGERS, _AWQ, symmetric=_BOTH, flags=_AVX512),
    # 2 to 8 bits are declared; kernels of vLLM's own are for 4 and 8, others need the package humming.
    Support("pack-quantized", "cuda", (4,), _INTEGERS, _WNA16, groups=_PACKED_GROUPS, symmetric=_BOTH),
    Support("pack-quantized", "cuda", (8,), _INTEGERS, _WNA16, groups=GPTQ_GROUPS),
    Support("pack-quantized", "cpu", (4,), _CPU_INTEGERS, _WNA16),
    Support("pack-quantized", "cpu", (4,), _CPU_INTEGERS, _WNA16, symmetric=(False,), flags=_AVX512),
    Support("int-quantized", "cuda", (8,), _CUTLASS_INT8, _W8A8_INT8, _WHOLE, inputs=("int8",)),
    Support("int-quantized", "cpu", (8,), _CPU_INT8, _W8A8_INT8, _WHOLE, inputs=("int8",)),
    Support("float-quantized", "cuda", (8,), _CUDA_FP8, _W8A8_FP8, _WHOLE_OR_BLOCK, inputs=("fp8", "none")),
    # One scale for a whole matrix: q, k and v are requantized to a common one, by an operator for GPUs only.
    # 0.33 adds CPUFp8ChannelWiseScaledMM for AMX.
    Support("float-quantized", "cpu", (8,), _CPU_FP8, _W8A8_FP8, ("channel",), inputs=("fp8",)),
    Support(
        "float-quantized",
        "cpu",
        (8,),
        "CPUFp8BlockScaledMM",
        _W8A8_FP8,
        ("block",),
        inputs=("fp8",),
        flags=frozenset({AMX}),
    ),
    Support("fp8", "cuda", (8,), _CUDA_FP8, _FP8, ("tensor", "block"), inputs=("fp8",)),
    Support("fp8", "cpu", (8,), "CPUFp8BlockScaledMM", _FP8, ("block",), inputs=("fp8",), flags=frozenset({AMX})),
    Support(
        "nvfp4-pack-quantized",
        "cuda",
        (4,),
        _NVFP4,
        "layers/quantization/compressed_tensors/schemes/compressed_tensors_w4a4_nvfp4.py",
        ("tensor_group",),
        (16,),
        inputs=("none", "fp4"),
    ),
    Support("modelopt", "cuda", (4,), _NVFP4, _MODELOPT, ("tensor_group",), (16,), inputs=("none", "fp4")),
    Support("modelopt", "cuda", (8,), _CUDA_FP8, _MODELOPT, ("tensor",), inputs=("fp8",), capability=89),
    Support(
        "mxfp4-pack-quantized",
        "cuda",
        (4,),
        "FlashInfer or Marlin MXFP4",
        "layers/quantization/compressed_tensors/schemes/compressed_tensors_w4a4_mxfp4.py",
        ("group",),
        (32,),
        inputs=("none", "fp8", "fp4"),
        capability=80,
    ),
    # Experts only: linear layers of such a checkpoint are not quantized.
    Support(
        "mxfp4",
        "cuda",
        (4,),
        "MXFP4 experts, by Triton or Marlin",
        "layers/quantization/mxfp4.py",
        ("group",),
        (32,),
        capability=80,
    ),
)
# What to use instead, by format, where an engine doesn't load it.
_INSTEAD = "use a scheme of the table in quantize/README.md"


def supports(scheme: QuantizationScheme, engine: Engine) -> Support | None:
    """Find the row by which an engine loads a scheme."""
    return next((row for row in rows(scheme.compression, engine) if not list(_problems(scheme, row))), None)


def rows(compression: Compression, engine: Engine) -> tuple[Support, ...]:
    """Return the rows of a format on an engine; integer and float layers of `naive-quantized` are those of others."""
    if compression == "naive-quantized":
        return (*rows("int-quantized", engine), *rows("float-quantized", engine))
    return tuple(row for row in SUPPORTED if row.compression == compression and row.engine == engine)


def refusal(scheme: QuantizationScheme, engine: Engine, flags: frozenset[str] | None = None) -> str | None:
    """Say why an engine doesn't load a scheme, and what it loads instead; None if it does.

    `flags` are instruction sets of the CPU that is asked about; None: of any CPU.
    """
    row = supports(scheme, engine)
    if row is not None:
        return _lacking(scheme, row, flags) if engine == "cpu" and flags is not None else None
    known = rows(scheme.compression, engine)
    if not known:
        return _without_rows(scheme, engine)
    return min((list(_problems(scheme, row)) for row in known), key=len)[0]


def loaded_anywhere(scheme: QuantizationScheme) -> bool:
    """Whether any engine loads a scheme."""
    return any(supports(scheme, engine) for engine in ENGINES)


def tile(weights: QuantizationArgs) -> int:
    """Return what both sides of a matrix are multiples of, where its groups or blocks want no more."""
    return FP8_TILE if weights.type == "float" else CPU_TILE


def kernels(scheme: QuantizationScheme, engine: Engine) -> str:
    """Name the kernels that an engine which loads a scheme runs it with; empty for one that doesn't."""
    row = supports(scheme, engine)
    if row is None:
        return ""
    if engine == "cpu":
        return f"{row.kernels}, with {' or '.join(sorted(row.flags))}" if row.flags else row.kernels
    # Machete has no groups of 32 (kernels/linear/mixed_precision/machete.py).
    name = "Marlin" if row.kernels == _INTEGERS and scheme.weights.columns == CPU_TILE else row.kernels
    return f"{name}, from {_GENERATIONS[row.capability]} on"


def kv_cache_refusal(dtype: str, engine: Engine, flags: frozenset[str] | None = None) -> str | None:
    """Say why an engine has no KV cache of a dtype; None if it has."""
    if engine == "cuda" or not dtype.startswith("fp8") or flags is None or flags & CPU_FP8_KV_CACHE_FLAGS:
        return None
    return f"kv_cache_dtype {dtype} needs AVX-512 or AMX, which this CPU lacks; use auto"


def cache_scales_refusal(compression: Compression) -> str | None:
    """Say why vLLM loads no scales of an FP8 KV cache beside weights that are stored so; None if it does.

    AutoGPTQConfig has no method for attention (get_quant_method of auto_gptq.py). Fp8Config has one, and no
    kv_cache_scheme by which `--kv-cache-dtype auto` would become FP8.
    """
    if compression in COMPRESSED_TENSORS:
        return None
    return (
        f"vLLM loads scales of an FP8 KV cache beside compressed-tensors, not beside {compression}; use w4a16-asym, "
        "w8a8 or fp8-dynamic, or serve it with kv_cache_dtype: fp8, whose scales are then 1.0"
    )


def float32_refusal(scheme: QuantizationScheme, engine: Engine) -> str | None:
    """Say why layers of a scheme don't compute in float32, or None; all compute in bfloat16.

    AutoGPTQConfig and AutoAWQConfig list half and bfloat16 only, and cpu_gemm_wna16 has no float kernel.
    """
    packed = scheme.compression == "pack-quantized" and engine == "cpu"
    if not packed and scheme.compression not in ("gptq", "awq"):
        return None
    what = "int4 on CPU" if packed else scheme.compression.upper()
    return f"{what} does not compute in float32; leave dtype out, or use bfloat16"


_GENERATIONS = {75: "Turing", 80: "Ampere", 89: "Ada"}


def _problems(scheme: QuantizationScheme, row: Support) -> Iterator[str]:
    """Yield what of a scheme is not in a row, the most telling first."""
    weights, where = scheme.weights, scheme.where
    what, on = f"{_words(scheme)}{where}", "" if row.engine == "cuda" else " on CPU"
    if weights.num_bits not in row.bits:
        yield f"vLLM{on} loads {what} of {_listed(row.bits)} bits, not of {weights.num_bits}{_eight_bits(scheme, row)}"
    if weights.symmetric not in row.symmetric:
        yield f"vLLM{on} loads symmetric {what} only; quantize with symmetric weights (sym: true)"
    if weights.actorder in REORDERING and weights.columns != -1:
        yield f"vLLM no longer loads {what} with desc_act (actorder: group) and groups; quantize without it"
    if weights.strategy not in row.strategies:
        yield f"vLLM{on} loads {what} with a scale per {_listed(row.strategies)}, not per {weights.strategy}"
    elif row.groups and weights.columns not in row.groups:
        yield f"vLLM{on} loads {what} in groups of {_groups(row.groups)}, not of {weights.columns}"
    if inputs_of(scheme) not in row.inputs:
        yield f"vLLM{on} loads {what} with {_listed(row.inputs)} activations, not {inputs_of(scheme)}{_w8a8(scheme)}"


def inputs_of(scheme: QuantizationScheme) -> str:
    """Return the type of the activations in a word; `none`: they are not quantized."""
    inputs = scheme.input_activations
    return "none" if inputs is None or inputs.num_bits >= UNQUANTIZED_BITS else inputs.precision


def _without_rows(scheme: QuantizationScheme, engine: Engine) -> str:
    if rows(scheme.compression, "cuda") and engine == "cpu":
        return f"vLLM has no CPU kernel for {_words(scheme)}; serve it on a GPU"
    return f"vLLM does not load {_words(scheme)}; {_INSTEAD}"


def _lacking(scheme: QuantizationScheme, row: Support, flags: frozenset[str]) -> str | None:
    if not row.flags or row.flags & flags:
        return None
    instead = "fp8-dynamic" if scheme.weights.type == "float" else "symmetric weights, as of w4a16-g128"
    asymmetric = "" if scheme.weights.symmetric else " with zero points"
    needs = f"needs a CPU with {' or '.join(sorted(row.flags))}, which this one lacks"
    return f"{_words(scheme)}{asymmetric} {needs}; use {instead}"


def _eight_bits(scheme: QuantizationScheme, row: Support) -> str:
    eight = scheme.weights.num_bits == 8 and scheme.weights.type == "int" and row.engine == "cpu"
    return f"; {'use scheme w8a8, which loads on CPU and CUDA' if eight else f'quantize to {_listed(row.bits)} bits'}"


def _w8a8(scheme: QuantizationScheme) -> str:
    integer = scheme.weights.type == "int"
    return f"; use scheme {'w8a8' if integer else 'fp8-dynamic'}"


def _words(scheme: QuantizationScheme) -> str:
    names = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "modelopt": "ModelOpt", "mxfp4": "MXFP4"}
    return names.get(scheme.compression, scheme.compression)


def _listed(values: tuple[object, ...]) -> str:
    return " or ".join(map(str, values))


def _groups(groups: tuple[int, ...]) -> str:
    sizes = [str(size) for size in groups if size > 0]
    return f"{', '.join(sizes)}{' or -1 (all inputs)' if -1 in groups else ''}"
