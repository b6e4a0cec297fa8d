"""Child process of test_plugin.py: compares vLLM's CPU engine before and after the plugin, and prints JSON.

It makes torch report a CPU without AVX-512, so that vLLM loads its build for AVX2 on every x86 machine; the environment
variable ONEDNN_MAX_CPU_ISA does the same for oneDNN.
"""

import inspect
import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
torch.cpu._is_avx512_supported = lambda: False

import vllm._custom_ops as ops  # noqa: E402
import zmq  # noqa: E402
from vllm.distributed.device_communicators import shm_broadcast  # noqa: E402
from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # noqa: E402

from serving.vllm_plugin.plugin import PATCHES, register  # noqa: E402

INPUTS, OUTPUTS = 576, 320
in_use: list[Any] = []  # the plugin identifies a weight by its address, which must not be reused


def needed() -> dict[str, bool]:
    """Which defects the patches detect now."""
    return {patch.name: patch.is_needed() for patch in PATCHES}


def unsupported() -> dict[str, Any]:
    """Register the plugin in a vLLM of another version."""
    import vllm  # noqa: PLC0415 - after the fake CPU above

    log, version = io.StringIO(), vllm.__version__
    handler = logging.StreamHandler(log)
    logging.getLogger("vllm.quantgate").addHandler(handler)
    vllm.__version__ = "0.34.0"
    register()
    vllm.__version__ = version
    logging.getLogger("vllm.quantgate").removeHandler(handler)
    return {"needed": needed(), "log": log.getvalue()}


def yields() -> int:
    """How often one wait for another process calls `sched_yield`."""
    calls: list[None] = []
    original, os.sched_yield = os.sched_yield, lambda: calls.append(None)
    context = zmq.Context()
    # No process listens there.
    waiting = shm_broadcast.SpinCondition(is_reader=True, context=context, notify_address="tcp://127.0.0.1:1")
    waiting.wait()
    context.destroy(linger=0)
    os.sched_yield = original
    return len(calls)


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the difference, relative to the exact result."""
    return float((result.double() - exact).norm() / exact.norm())


def operands(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and bias."""
    torch.manual_seed(0)
    return torch.randn(tokens, INPUTS, dtype=torch.bfloat16), torch.randn(OUTPUTS, dtype=torch.bfloat16)


def int8_error(tokens: int) -> float:
    """A W8A8 layer as vLLM's OneDNN kernel calls it."""
    x, bias = operands(tokens)
    weight = torch.randint(-128, 128, (OUTPUTS, INPUTS), dtype=torch.int8)
    scales = torch.rand(OUTPUTS, 1, dtype=torch.float32) * 0.01
    handle = ops.create_onednn_scaled_mm(weight.t(), scales, torch.bfloat16, True, False)
    in_use.append((weight, scales, handle))
    rounded, x_scales, _ = ops.onednn_scaled_int8_quant(x, None, None, True)
    result = torch.empty(tokens, OUTPUTS, dtype=torch.bfloat16)
    ops.onednn_scaled_mm(handle, rounded, result, x_scales, None, None, bias)
    exact = (rounded.double() @ weight.double().t()) * x_scales.double() * scales.double().t() + bias.double()
    return relative_error(result, exact)


def int4_error(group: int, tokens: int = 5) -> float:
    """A GPTQ int4 layer in the layout of vLLM's CPUWNA16LinearKernel: blocks of 16 channels, 8 values a word."""
    x, bias = operands(tokens)
    values = torch.randint(0, 16, (INPUTS, OUTPUTS), dtype=torch.int32)
    scales = (torch.rand(INPUTS // group, OUTPUTS) * 0.01).bfloat16()
    words = (values.view(INPUTS, OUTPUTS // 8, 8).long() << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)
    blocks = words.view(INPUTS, -1, 2).permute(1, 0, 2).reshape(-1, INPUTS * 2).contiguous()
    in_use.append((blocks, scales))
    result = ops.cpu_gemm_wna16(x, blocks, scales, None, bias, 8, "vec")
    exact = x.double() @ ((values - 8).double() * scales.double().repeat_interleave(group, 0)) + bias.double()
    return relative_error(result, exact)


def draws() -> list[list[float]]:
    """A discarded draw, then two that count; vLLM rewinds after the first."""
    generator = torch.Generator(device=torch.device("cpu"))
    generator.manual_seed(7)
    first = torch.empty(5).exponential_(generator=generator).tolist()
    generator.set_offset(generator.get_offset() - 4)
    return [first, *(torch.empty(5).exponential_(generator=generator).tolist() for _ in range(2))]


report: dict[str, Any] = {"needed before": needed(), "unsupported": unsupported()}
source = inspect.getsource(GPUModelRunner._bookkeeping_sync)
report["rewinds by offset"] = "if gen is not None:\n                gen.set_offset(gen.get_offset() - 4)" in source
yields_before = yields()
register()
report["needed after"] = needed()
report["yields"] = {"before": yields_before, "after": yields()}
torch.set_default_dtype(torch.bfloat16)  # as while vLLM loads a model
report["errors"] = {f"int8, {tokens} tokens": int8_error(tokens) for tokens in (1, 40)}
report["errors"] |= {f"int4, group {group}": int4_error(group) for group in (32, 64, 576)}
report["draws"] = draws()
report["accepts torch's own generator"] = isinstance(torch.default_generator, torch.Generator)
print(json.dumps(report))
