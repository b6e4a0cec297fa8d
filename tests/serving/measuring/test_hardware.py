"""The hardware and the memory of a measured replica."""

import os
from pathlib import Path

import pytest

from serving.measuring.hardware import bound_cores, local_hardware, used_gpu_bytes, used_gpus
from serving.measuring.memory import PeakMemory, proportional_bytes, session_memory_bytes
from tests.serving.supervised import launch


@pytest.mark.parametrize(
    "cores,count",
    [(None, 6), ("auto", 6), ("nobind", 6), ("0", 1), ("0-3", 4), ("0-3,8", 5), ("0-1|2-3", 4), ("0-1,1-2", 3)],
)
def test_bound_cores_are_counted(cores: str | None, count: int) -> None:
    """Each CPU once, over all ranks; a word means all available ones."""
    assert bound_cores(cores, 6) == count


@pytest.mark.parametrize("rollup,size", [("Rss: 9 kB\nPss:     2048 kB\nPss_Dirty: 1 kB\n", 2**21), ("", None)])
def test_the_proportional_size_is_read(rollup: str, size: int | None) -> None:
    """Shared pages are counted by their share."""
    assert proportional_bytes(rollup) == size


def test_the_memory_of_a_session(tmp_path: Path) -> None:
    """The session of the tests takes more than a megabyte; an external server is not sampled."""
    assert session_memory_bytes(os.getsid(0)) > 2**20
    external = PeakMemory(None)
    external.sample()
    assert external.host_bytes is None


def test_gpus_of_a_launch(tmp_path: Path) -> None:
    """On CPU there are none."""
    assert used_gpus(launch(tmp_path)) == ()


def test_this_machine_has_a_name(tmp_path: Path) -> None:
    """Without flags a local replica computes on all of it."""
    hardware = local_hardware(launch(tmp_path, cores="0").settings)
    assert hardware.device
    assert hardware.count == 1


def test_memory_of_an_unknown_gpu() -> None:
    """An index that no GPU has is unknown, not zero."""
    assert used_gpu_bytes((9999,)) is None
