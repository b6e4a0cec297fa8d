"""Integer products on any CPU are right once the plugin is registered."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantize.engine_plugin import torch_groups

ROOT = Path(__file__).resolve().parents[2]
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

# Registering changes the operators of a process for good, so a child process measures; importing vLLM takes most of its
# time, so one child measures all products.
PRODUCTS = """
import json, torch
from vllm.distributed.device_communicators import shm_broadcast as queue
from vllm.distributed.utils import sched_yield
assert queue.sched_yield is sched_yield
import vllm._custom_ops as ops
from quantize.engine_plugin import register
register()
torch.set_default_dtype(torch.bfloat16)  # as while vLLM loads a model
inputs, outputs = 576, 320
in_use = []  # the plugin knows a weight by its address, which must not be used again

def relative_error(result, exact):
    return float((result.double() - exact).norm() / exact.norm())

def operands(tokens):
    torch.manual_seed(0)
    return torch.randn(tokens, inputs, dtype=torch.bfloat16), torch.randn(outputs, dtype=torch.bfloat16)

def int8(tokens):
    x, bias = operands(tokens)
    weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    scales = torch.rand(outputs, 1, dtype=torch.float32) * 0.01
    handle = ops.create_onednn_scaled_mm(weight.t(), scales, torch.bfloat16, True, False)
    in_use.append((weight, scales, handle))
    rounded, x_scales, _ = ops.onednn_scaled_int8_quant(x, None, None, True)
    result = torch.empty(tokens, outputs, dtype=torch.bfloat16)
    ops.onednn_scaled_mm(handle, rounded, result, x_scales, None, None, bias)
    exact = (rounded.double() @ weight.double().t()) * x_scales.double() * scales.double().t() + bias.double()
    return relative_error(result, exact)

def int4(group, tokens=5):
    # The layout that vLLM's CPUWNA16LinearKernel makes: 16 output channels in a block, eight 4-bit values in a word.
    x, bias = operands(tokens)
    values = torch.randint(0, 16, (inputs, outputs), dtype=torch.int32)
    scales = (torch.rand(inputs // group, outputs) * 0.01).bfloat16()
    words = (values.view(inputs, outputs // 8, 8).long() << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)
    blocks = words.view(inputs, -1, 2).permute(1, 0, 2).reshape(-1, inputs * 2).contiguous()
    in_use.append((blocks, scales))
    result = ops.cpu_gemm_wna16(x, blocks, scales, None, bias, 8, "vec")
    exact = x.double() @ ((values - 8).double() * scales.double().repeat_interleave(group, 0)) + bias.double()
    return relative_error(result, exact)

errors = {f"int8, {tokens} tokens": int8(tokens) for tokens in (1, 40)}
errors |= {f"int4, group {group}": int4(group) for group in (32, 64, 576)}
"""
NAP = """
import os, zmq
context = zmq.Context()
# Nothing listens there.
waiting = queue.SpinCondition(is_reader=True, context=context, notify_address="tcp://127.0.0.1:1")
del os.sched_yield  # a call of it fails
waiting.wait()
context.destroy(linger=0)
print(json.dumps({"errors": errors, "sched_yield": queue.sched_yield.__name__}))
"""


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """The relative error of each product, and which function replaces `sched_yield` in vLLM's wait."""
    command = [sys.executable, "-c", PRODUCTS + NAP]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@needs_vllm
@pytest.mark.real_model
@pytest.mark.parametrize(
    "product", ["int8, 1 tokens", "int8, 40 tokens", "int4, group 32", "int4, group 64", "int4, group 576"]
)
def test_product_is_right(measured: dict[str, Any], product: str) -> None:
    """vLLM's int8 and int4 products with weights of full range equal the exact ones, up to bf16's rounding."""
    assert measured["errors"][product] < 0.005


@pytest.mark.parametrize(
    "inputs,groups,expected",
    [(576, 9, (64, 1)), (4096, 32, (128, 1)), (4096, 1, (256, 16)), (576, 1, (64, 9)), (256, 8, (32, 1))],
)
def test_groups_that_torch_knows(inputs: int, groups: int, expected: tuple[int, int]) -> None:
    """A group is cut into equal ones of a size that torch's kernel takes."""
    assert torch_groups(inputs, groups) == expected


def test_group_that_no_kernel_takes() -> None:
    """A group size that can't be cut is told with the sizes that can."""
    with pytest.raises(ValueError, match="use group size 32, 64 or 128"):
        torch_groups(48, 3)


@needs_vllm
@pytest.mark.real_model
def test_processes_of_an_engine_nap_while_they_wait(measured: dict[str, Any]) -> None:
    """vLLM's wait for another process sleeps instead of calling `sched_yield`, and leaves the core to others."""
    assert measured["sched_yield"] == "nap"


REWIND = """
import torch
from quantize.engine_plugin import rewindable
torch.Generator = rewindable(torch.Generator)
generator = torch.Generator(device=torch.device("cpu"))
generator.manual_seed(7)
draw = lambda: torch.empty(5).exponential_(generator=generator).tolist()
first = draw()
generator.set_offset(generator.get_offset() - 4)  # as vLLM does after a part of a prompt
again, second = draw(), draw()
print([first == again, first == second, isinstance(torch.default_generator, torch.Generator)])
"""


@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_a_generator_turns_back() -> None:
    """A draw that vLLM throws away leaves no trace, so a seeded answer doesn't depend on how its prompt was cut."""
    done = subprocess.run([sys.executable, "-c", REWIND], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[True, False, True]", done.stderr[-2000:]
