"""Entry point of the plugin, in the entry-point group `vllm.general_plugins`.

| patch | defect of vLLM 0.32 and 0.33 | where |
| --- | --- | --- |
| int4 matmul | no `cpu_gemm_wna16`: GPTQ int4 fails at the first token | x86 without AVX-512 |
| int8 matmul | 16-bit sums overflow: 13 to 19 % error in the output of a layer | x86, builds for AVX2 |
| seeded generator | `seed` with a prompt of several batches terminates the engine | every CPU |
| busy wait | processes of the engine poll with `sched_yield` and starve others | every CPU |

Reported in vllm#55613, oneDNN#717, vllm#43028 (for XPU) and vllm#52848. The plugin changes nothing on GPUs and in
unsupported versions of vLLM.
"""

import logging
from importlib import import_module

from serving.engine_version import is_supported
from serving.vllm_plugin.busy_wait import BUSY_WAIT
from serving.vllm_plugin.int4_matmul import INT4_MATMUL
from serving.vllm_plugin.int8_matmul import INT8_MATMUL
from serving.vllm_plugin.seeded_generator import SEEDED_GENERATOR

PATCHES = (INT4_MATMUL, INT8_MATMUL, SEEDED_GENERATOR, BUSY_WAIT)


def register() -> None:
    """Apply the patches whose defect this CPU engine has; change nothing in another build or an unsupported vLLM."""
    import torch  # noqa: PLC0415 - vLLM has loaded it

    # vLLM loads its operators before or after its plugins; the patches need them.
    torch.ops.import_module("vllm._custom_ops")
    if not hasattr(torch.ops._C, "onednn_scaled_mm"):  # noqa: SLF001
        return  # not a CPU build of vLLM
    log = logging.getLogger("vllm.quantgate")  # vLLM configures the handlers of `vllm`
    version = str(import_module("vllm").__version__)
    if not is_supported(version):
        log.warning("CPU patches of quantgate are not applied: vLLM %s is not supported", version)
        return
    for patch in PATCHES:
        if patch.is_needed():
            patch.apply()
            log.info("quantgate patched vLLM: %s (%s)", patch.name, patch.upstream)
