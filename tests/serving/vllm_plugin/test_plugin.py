"""Each patch of vLLM's CPU engine: the tested vLLM still has the defect, and with the plugin it is gone.

A test of a defect that fails says that vLLM has fixed it: remove the patch.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving.vllm_plugin.int4_matmul import torch_groups
from serving.vllm_plugin.plugin import PATCHES

ROOT = Path(__file__).resolve().parents[3]
PATCHED_VLLM = Path(__file__).with_name("patched_vllm.py")
CPUINFO = Path("/proc/cpuinfo")
on_x86 = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or platform.machine() != "x86_64",
    reason="needs vLLM's CPU builds for x86",
)


@pytest.fixture(scope="module")
def child() -> dict[str, Any]:
    """What a child process saw before and after it registered the plugin, with vLLM's build for AVX2.

    A child, because patches change a process for good; one, because importing vLLM takes most of the time.
    """
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, str(PATCHED_VLLM)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@on_x86
@pytest.mark.real_model
@pytest.mark.parametrize("name", [patch.name for patch in PATCHES])
def test_vllm_still_has_the_defect(child: dict[str, Any], name: str) -> None:
    """Detected by the patch itself before the plugin is registered, and no longer afterwards."""
    assert child["needed before"][name]
    assert not child["needed after"].get(name, False)


@on_x86
@pytest.mark.real_model
def test_vllm_still_rewinds_generators_by_an_offset(child: dict[str, Any]) -> None:
    """The call that terminates a CPU engine is in the model runner, without a check of the device."""
    assert child["rewinds by offset"]


VNNI = """
import torch, vllm._custom_ops
from serving.vllm_plugin.int8_matmul import overflows
print([overflows() for _ in range(5)])
"""


@on_x86
@pytest.mark.real_model
@pytest.mark.skipif(
    not CPUINFO.is_file() or "avx512_vnni" not in CPUINFO.read_text(), reason="needs a CPU with AVX-512 VNNI"
)
def test_vnni_does_not_overflow() -> None:
    """Where oneDNN's sums are exact, vLLM keeps its own int8 operators."""
    done = subprocess.run([sys.executable, "-c", VNNI], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == [str([False] * 5)], done.stderr[-2000:]


@on_x86
@pytest.mark.real_model
def test_an_unsupported_vllm_is_not_patched(child: dict[str, Any]) -> None:
    """Only a warning is logged."""
    assert child["unsupported"]["needed"] == child["needed before"]
    assert "vLLM 0.34.0 is not supported" in child["unsupported"]["log"]


@on_x86
@pytest.mark.real_model
@pytest.mark.parametrize(
    "product", ["int8, 1 tokens", "int8, 40 tokens", "int4, group 32", "int4, group 64", "int4, group 576"]
)
def test_products_are_exact(child: dict[str, Any], product: str) -> None:
    """int8 and int4 products with weights of full range equal the exact ones, up to bf16 rounding."""
    assert child["errors"][product] < 0.005


@on_x86
@pytest.mark.real_model
def test_waiting_for_a_process_sleeps(child: dict[str, Any]) -> None:
    """vLLM's wait for another process sleeps instead of calling `sched_yield`."""
    assert child["yields"] == {"before": 1, "after": 0}


@on_x86
@pytest.mark.real_model
def test_a_seeded_generator_rewinds(child: dict[str, Any]) -> None:
    """A discarded draw leaves no trace, so a seeded answer doesn't depend on how its prompt was split."""
    first, again, second = child["draws"]
    assert first == again != second
    assert child["accepts torch's own generator"]


@pytest.mark.parametrize(
    "inputs,groups,expected",
    [(576, 9, (64, 1)), (4096, 32, (128, 1)), (4096, 1, (256, 16)), (576, 1, (64, 9)), (256, 8, (32, 1))],
)
def test_group_sizes_of_torch(inputs: int, groups: int, expected: tuple[int, int]) -> None:
    """A group is split into equal parts of a size that torch's kernel supports."""
    assert torch_groups(inputs, groups) == expected


def test_an_unsupported_group_size() -> None:
    """The error names the supported sizes."""
    with pytest.raises(ValueError, match="use group size 32, 64 or 128"):
        torch_groups(48, 3)


def test_patches_name_their_report() -> None:
    """Names are unique, and each patch links the report of its defect."""
    assert len({patch.name for patch in PATCHES}) == len(PATCHES)
    assert all(patch.upstream.startswith("https://github.com/") for patch in PATCHES)
