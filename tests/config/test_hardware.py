"""Hardware, from the files of the kernel and the output of nvidia-smi."""

import os
import platform
from pathlib import Path

import pytest

from config.hardware import Gpu, parse_cpus, parse_nvidia_smi, read_cores, read_processor


def write(path: Path, text: str) -> None:
    """One of the kernel's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_cores_keep_their_threads_together(tmp_path: Path) -> None:
    """Threads of a core are one core with its node; CPUs that this process may not use are left out."""
    allowed = sorted(os.sched_getaffinity(0))
    everyone = ",".join(map(str, [*allowed, 9999]))
    for cpu in allowed:
        write(tmp_path / f"cpu/cpu{cpu}/topology/thread_siblings_list", everyone)
    write(tmp_path / "node/node3/cpulist", everyone)
    (core,) = read_cores(tmp_path)
    assert (core.node, core.cpus) == (3, tuple(allowed))


def test_cores_without_topology(tmp_path: Path) -> None:
    """Without topology files each CPU is a core."""
    assert [core.cpus for core in read_cores(tmp_path)] == [(cpu,) for cpu in sorted(os.sched_getaffinity(0))]


def test_cpu_lists() -> None:
    """Ranges and single numbers."""
    assert parse_cpus("0-2,5\n") == [0, 1, 2, 5]


def test_nvidia_smi() -> None:
    """Rows become GPUs; a row without numbers, such as an error, is ignored."""
    table = "0, NVIDIA H100, 81559, 81000, 570.86\n1, NVIDIA H100, [N/A], [N/A], 570.86\nNo devices were found\n"
    assert parse_nvidia_smi(table) == (Gpu(0, "NVIDIA H100", 81559 * 2**20, 81000 * 2**20, "570.86"),)


X86 = "processor\t: 0\nmodel name\t: AMD  EPYC 9654\nflags\t: fpu avx2\n\nprocessor\t: 1\nmodel name\t: other\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
PI = f"{ARM}\nModel\t\t: Raspberry Pi 5\n"


@pytest.mark.parametrize(
    "cpuinfo,name,flags",
    [
        (X86, "AMD EPYC 9654", {"fpu", "avx2"}),
        (ARM, "ARM 0x41 part 0xd40", {"fp", "asimd"}),
        (PI, "Raspberry Pi 5", {"fp", "asimd"}),
        ("", platform.machine(), set()),
    ],
)
def test_processors(tmp_path: Path, cpuinfo: str, name: str, flags: set[str]) -> None:
    """Named by model, by part number on ARM, else by architecture."""
    write(tmp_path / "cpuinfo", cpuinfo)
    processor = read_processor(tmp_path / "cpuinfo")
    assert (processor.name, set(processor.flags)) == (name, flags)
