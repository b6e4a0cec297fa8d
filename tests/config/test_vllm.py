"""The table of what vLLM loads, asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.quantization import QuantizationArgs, QuantizationScheme, grouped
from config.vllm import ENGINES, SUPPORTED, Engine, kernels, kv_cache_refusal, refusal, supports

INT8 = QuantizationArgs(strategy="token", dynamic=True)
FP8 = QuantizationArgs(type="float", strategy="token", dynamic=True)
CHANNELS = QuantizationArgs(type="float", strategy="channel")
ANY_ARGS = st.builds(
    QuantizationArgs,
    num_bits=st.integers(1, 16),
    type=st.sampled_from(["int", "float"]),
    symmetric=st.booleans(),
    strategy=st.sampled_from(["tensor", "channel", "group", "block", "tensor_group"]),
    group_size=st.none() | st.sampled_from([16, 32, 48, 64, 128]),
    actorder=st.none() | st.sampled_from(["group", "static"]),
)
ANY_SCHEME = st.builds(
    QuantizationScheme,
    compression=st.sampled_from([*{row.compression for row in SUPPORTED}, "naive-quantized", "bitsandbytes"]),
    weights=ANY_ARGS,
    input_activations=st.none() | st.sampled_from([INT8, FP8]),
)


@pytest.mark.parametrize(
    "scheme,engine,word",
    [
        (QuantizationScheme("gptq", grouped(4, 128)), "cpu", None),
        (QuantizationScheme("gptq", grouped(8, 128)), "cpu", "use scheme w8a8"),
        (QuantizationScheme("gptq", grouped(8, 128)), "cuda", None),
        (QuantizationScheme("gptq", grouped(4, 128, symmetric=False)), "cuda", "symmetric GPTQ only"),
        (QuantizationScheme("gptq", grouped(4, 128, actorder="group")), "cuda", "desc_act"),
        (QuantizationScheme("gptq", grouped(4, -1, actorder="group")), "cuda", None),
        (QuantizationScheme("pack-quantized", grouped(4, 128, actorder="static")), "cuda", None),
        (QuantizationScheme("pack-quantized", grouped(4, 16)), "cpu", None),
        (QuantizationScheme("pack-quantized", grouped(4, 16)), "cuda", "groups of 32, 64, 128, 256 or -1"),
        (QuantizationScheme("pack-quantized", grouped(4, 128, symmetric=False)), "cpu", None),
        (QuantizationScheme("awq", grouped(4, 128, symmetric=False)), "cuda", None),
        (QuantizationScheme("awq", grouped(8, 128)), "cuda", "of 4 bits, not of 8"),
        (QuantizationScheme("int-quantized", QuantizationArgs(strategy="channel"), INT8), "cpu", None),
        (QuantizationScheme("int-quantized", QuantizationArgs(strategy="channel")), "cpu", "use scheme w8a8"),
        (QuantizationScheme("naive-quantized", QuantizationArgs(strategy="channel"), INT8), "cpu", None),
        (QuantizationScheme("naive-quantized", CHANNELS, FP8), "cpu", None),
        (QuantizationScheme("float-quantized", CHANNELS, FP8), "cpu", None),
        (QuantizationScheme("float-quantized", CHANNELS), "cuda", None),
        (QuantizationScheme("float-quantized", CHANNELS), "cpu", "use scheme fp8-dynamic"),
        (QuantizationScheme("float-quantized", QuantizationArgs(type="float"), FP8), "cpu", "not per tensor"),
        (QuantizationScheme("bitsandbytes", QuantizationArgs(strategy="channel")), "cuda", "does not load"),
        (QuantizationScheme("mxfp4", grouped(4, 32)), "cpu", "no CPU kernel for MXFP4; serve it on a GPU"),
    ],
)
def test_refusals(scheme: QuantizationScheme, engine: Engine, word: str | None) -> None:
    """The reason says what is loaded instead."""
    reason = refusal(scheme, engine)
    assert reason is None if word is None else word in str(reason)


@given(ANY_SCHEME, st.sampled_from(ENGINES))
def test_a_scheme_has_kernels_or_a_reason(scheme: QuantizationScheme, engine: Engine) -> None:
    """One or the other, whatever is asked."""
    assert (refusal(scheme, engine) is None) == bool(kernels(scheme, engine)) == (supports(scheme, engine) is not None)


@pytest.mark.parametrize(
    "dtype,engine,flags,refused",
    [
        ("auto", "cpu", {"avx2"}, False),
        ("fp8", "cuda", None, False),
        ("bfloat16", "cpu", {"avx2"}, False),
        ("fp8", "cpu", None, False),
        ("fp8", "cpu", {"avx2"}, True),
        ("fp8_e5m2", "cpu", {"avx512f"}, False),
    ],
)
def test_kv_cache(dtype: str, engine: Engine, flags: set[str] | None, refused: bool) -> None:
    """An FP8 KV cache needs wide vectors on a CPU."""
    known = None if flags is None else frozenset(flags)
    assert (kv_cache_refusal(dtype, engine, known) is not None) == refused
