"""What is read from a machine's own files."""

import os
from pathlib import Path

from serving.hardware import Gpu, parse_cpus, parse_nvidia_smi, read_cores


def write(path: Path, text: str) -> None:
    """One of the kernel's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_cores_keep_their_threads_together(tmp_path: Path) -> None:
    """Threads of one core are one core, with its node; only those that we may use count."""
    allowed = sorted(os.sched_getaffinity(0))
    everyone = ",".join(map(str, [*allowed, 9999]))
    for cpu in allowed:
        write(tmp_path / f"cpu/cpu{cpu}/topology/thread_siblings_list", everyone)
    write(tmp_path / "node/node3/cpulist", everyone)
    (core,) = read_cores(tmp_path)
    assert (core.node, core.cpus) == (3, tuple(allowed))


def test_cores_without_topology(tmp_path: Path) -> None:
    """Where the kernel doesn't tell, each CPU is a core of its own."""
    assert [core.cpus for core in read_cores(tmp_path)] == [(cpu,) for cpu in sorted(os.sched_getaffinity(0))]


def test_cpu_lists() -> None:
    """The kernel's way to write sets."""
    assert parse_cpus("0-2,5\n") == [0, 1, 2, 5]


def test_nvidia_smi() -> None:
    """Rows become GPUs; a row without numbers, as an error would be, is left out."""
    table = "0, NVIDIA H100, 81559, 81000, 570.86\n1, NVIDIA H100, [N/A], [N/A], 570.86\nNo devices were found\n"
    assert parse_nvidia_smi(table) == (Gpu(0, "NVIDIA H100", 81559 * 2**20, 81000 * 2**20, "570.86"),)
