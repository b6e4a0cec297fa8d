"""Hardware, from the files of the kernel and the output of nvidia-smi."""

import os
import platform
from pathlib import Path

import pytest

from config.hardware import Gpu, Memory, parse_cpus, parse_nvidia_smi, read_cores, read_memory, read_processor


def write(path: Path, text: str) -> None:
    """One of the kernel's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def meminfo(root: Path) -> None:
    """A machine of 16 GiB, 8 of them free."""
    write(root / "proc/meminfo", "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n")


def test_memory_of_a_machine(tmp_path: Path) -> None:
    """Without a container it is that of /proc/meminfo."""
    meminfo(tmp_path)
    assert read_memory(tmp_path) == Memory(16 * 2**30, 8 * 2**30)


@pytest.mark.parametrize(
    "group,folder,limit,usage,cached",
    [
        ("0::/pod", "sys/fs/cgroup/pod", "memory.max", "memory.current", "inactive_file"),
        (
            "4:memory:/pod",
            "sys/fs/cgroup/memory/pod",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
)
def test_memory_of_a_container(tmp_path: Path, group: str, folder: str, limit: str, usage: str, cached: str) -> None:
    """The limit of the cgroup, less its usage; page cache is available."""
    meminfo(tmp_path)
    write(tmp_path / "proc/self/cgroup", f"5:devices:/x\n{group}\n")
    write(tmp_path / folder / limit, f"{4 * 2**30}\n")
    write(tmp_path / folder / usage, f"{3 * 2**30}\n")
    write(tmp_path / folder / "memory.stat", f"anon 5\n{cached} {2**30}\n")
    assert read_memory(tmp_path) == Memory(4 * 2**30, 2 * 2**30)


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_a_container_without_a_limit(tmp_path: Path, limit: str) -> None:
    """`max` (v2) and a huge number (v1) mean no limit."""
    meminfo(tmp_path)
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    write(tmp_path / "sys/fs/cgroup/memory.max", limit)
    write(tmp_path / "sys/fs/cgroup/memory.current", "5")
    assert read_memory(tmp_path).free_bytes == 8 * 2**30


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
