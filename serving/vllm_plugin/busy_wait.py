"""Sleep while an engine process waits for another one, instead of polling without a pause.

vLLM's `SpinCondition.wait` calls `sched_yield` in a loop for a second after each message. Under Linux 6.18, the only
kernel tried, this takes nearly all of a shared core: beside one busy replica another process got 0.2 to 1 % of it, and
of two busy replicas one generated no token in ten seconds.
"""

import time
from importlib import import_module

from serving.vllm_plugin.patch import Patch

# A step of the engine takes milliseconds. With 50 us, a replica of SmolLM2-135M alone on two cores loses up to 10 %.
SLEEP_SECONDS = 50e-6
SHM_BROADCAST = "vllm.distributed.device_communicators.shm_broadcast"


def short_sleep() -> None:
    """Leave the core to other processes for a moment."""
    time.sleep(SLEEP_SECONDS)


def _polls_with_sched_yield() -> bool:
    return getattr(import_module(SHM_BROADCAST), "sched_yield", short_sleep) is not short_sleep


def _replace_sched_yield() -> None:
    import_module(SHM_BROADCAST).__dict__["sched_yield"] = short_sleep


BUSY_WAIT = Patch(
    "busy wait", "https://github.com/vllm-project/vllm/pull/52848", _polls_with_sched_yield, _replace_sched_yield
)
