"""Integer products on any CPU are right once the plugin is registered."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from quantize.engine_plugin import torch_groups

ROOT = Path(__file__).resolve().parents[2]
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

# One process per product: registering changes the operators of the process for good.
PREPARE = """
import torch, vllm._custom_ops as ops
from quantize.engine_plugin import register
register()
torch.set_default_dtype(torch.bfloat16)  # as while vLLM loads a model
torch.manual_seed(0)
inputs, outputs, tokens = 576, 320, {tokens}
given = torch.randn(tokens, inputs, dtype=torch.bfloat16)
bias = torch.randn(outputs, dtype=torch.bfloat16)
"""
INT8 = """
weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
scales = torch.rand(outputs, 1, dtype=torch.float32) * 0.01
handle = ops.create_onednn_scaled_mm(weight.t(), scales, torch.bfloat16, True, False)
rounded, given_scales, _ = ops.onednn_scaled_int8_quant(given, None, None, True)
told = torch.empty(tokens, outputs, dtype=torch.bfloat16)
ops.onednn_scaled_mm(handle, rounded, told, given_scales, None, None, bias)
exact = (rounded.double() @ weight.double().t()) * given_scales.double() * scales.double().t() + bias.double()
print(float((told.double() - exact).norm() / exact.norm()))
"""
# The layout that vLLM's CPUWNA16LinearKernel makes: 16 output channels in a block, eight 4-bit values in a word.
INT4 = """
group = {group}
values = torch.randint(0, 16, (inputs, outputs), dtype=torch.int32)
scales = (torch.rand(inputs // group, outputs) * 0.01).bfloat16()
words = (values.view(inputs, outputs // 8, 8).long() << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)
blocks = words.view(inputs, -1, 2).permute(1, 0, 2).reshape(-1, inputs * 2).contiguous()
told = ops.cpu_gemm_wna16(given, blocks, scales, None, bias, 8, "vec")
exact = given.double() @ ((values - 8).double() * scales.double().repeat_interleave(group, 0)) + bias.double()
print(float((told.double() - exact).norm() / exact.norm()))
"""


@needs_vllm
@pytest.mark.real_model
@pytest.mark.parametrize(
    "product,tokens", [(INT8, 1), (INT8, 40), *((INT4.format(group=group), 5) for group in (32, 64, 576))]
)
def test_product_is_right(product: str, tokens: int) -> None:
    """What vLLM computes with int8 and int4 weights of full range is what the numbers say, up to bf16's rounding."""
    command = [sys.executable, "-c", PREPARE.format(tokens=tokens) + product]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 0.005


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


WAIT = """
from vllm.distributed.device_communicators import shm_broadcast as queue
from vllm.distributed.utils import sched_yield as before
assert queue.sched_yield is before
from quantize.engine_plugin import register
register()
import zmq
context = zmq.Context()
waiting = queue.SpinCondition(is_reader=True, context=context, notify_address="tcp://127.0.0.1:1")  # nobody is there
import os
del os.sched_yield  # whoever would call it fails
waiting.wait()
context.destroy(linger=0)
print(queue.sched_yield.__name__)
"""


@needs_vllm
@pytest.mark.real_model
def test_processes_of_an_engine_nap_while_they_wait() -> None:
    """vLLM's wait for another process leaves the core to others."""
    done = subprocess.run([sys.executable, "-c", WAIT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "nap"


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
