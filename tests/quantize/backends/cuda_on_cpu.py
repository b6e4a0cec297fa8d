"""Imported at the start of a test's isolated interpreter: AutoGPTQ's calls of CUDA fall on the CPU.

It is what AutoGPTQ asks of CUDA while it solves, no more: whether it is there, where its first device is, and to wait.
"""

import torch

torch.cuda.is_available = lambda: True
torch.cuda.synchronize = lambda *_: None
torch.cuda.empty_cache = lambda: None

from auto_gptq.modeling import _base  # type: ignore[import-not-found]  # noqa: E402  after the answer above

_base.CUDA_0 = torch.device("cpu")
