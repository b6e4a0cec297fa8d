"""What a machine says of itself, as tables."""

import os
from pathlib import Path

import pytest

from serving.measuring.hardware import bound_cores, local_hardware, processor_name, smi_column, used_gpus
from serving.measuring.memory import MemoryWatch, proportional_bytes, session_memory_bytes
from tests.serving.supervised import launch

X86 = "processor\t: 0\nmodel name\t: AMD  EPYC 9654\n\nprocessor\t: 1\nmodel name\t: AMD  EPYC 9654\n"
ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
PI = f"{ARM}\nModel\t\t: Raspberry Pi 5\n"


@pytest.mark.parametrize(
    "cpuinfo,name",
    [(X86, "AMD EPYC 9654"), (ARM, "ARM 0x41 part 0xd40"), (PI, "Raspberry Pi 5"), ("", None), ("flags: a", None)],
)
def test_processors_are_named(cpuinfo: str, name: str | None) -> None:
    """By model where there is one, by part number on ARM."""
    assert processor_name(cpuinfo) == name


@pytest.mark.parametrize(
    "cores,count",
    [(None, 6), ("auto", 6), ("nobind", 6), ("0", 1), ("0-3", 4), ("0-3,8", 5), ("0-1|2-3", 4), ("0-1,1-2", 3)],
)
def test_bound_cores_are_counted(cores: str | None, count: int) -> None:
    """Each once, over all ranks; words mean all that there are."""
    assert bound_cores(cores, 6) == count


@pytest.mark.parametrize("rollup,size", [("Rss: 9 kB\nPss:     2048 kB\nPss_Dirty: 1 kB\n", 2**21), ("", None)])
def test_the_proportional_size_is_read(rollup: str, size: int | None) -> None:
    """Shared pages are counted by their share."""
    assert proportional_bytes(rollup) == size


def test_the_memory_of_a_session(tmp_path: Path) -> None:
    """Our own session takes more than a megabyte; nobody's takes none, and is not looked at."""
    assert session_memory_bytes(os.getsid(0)) > 2**20
    nobody = MemoryWatch(None)
    nobody.look()
    assert nobody.host_bytes is None


def test_gpus_of_a_launch(tmp_path: Path) -> None:
    """On CPU there are none."""
    assert used_gpus(launch(tmp_path)) == ()


def test_this_machine_has_a_name(tmp_path: Path) -> None:
    """Without flags a local replica computes on all of it."""
    hardware = local_hardware(launch(tmp_path, cores="0").settings)
    assert hardware.device
    assert hardware.count == 1


def test_a_column_that_nobody_tells_is_empty() -> None:
    """A fact that isn't one is as good as no GPU."""
    assert smi_column("no.such.fact") == []
