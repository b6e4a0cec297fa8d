"""Memory: how much it takes is arithmetic, how much there is the kernel tells."""

from pathlib import Path

import pytest

from quantize.base import read_base
from quantize.running.memory import Machine, available_bytes, free_gpu_bytes, widest_inputs
from tests.quantize.models import write_hollow_model

GIGA = 10**9


def test_the_widest_layer_sets_the_size_of_the_hessian(tmp_path: Path) -> None:
    """It is the one with the most inputs."""
    assert widest_inputs(read_base(write_hollow_model(tmp_path / "base"))) == 1536


@pytest.mark.parametrize("gpus,engine", [((), "cpu"), ((80 * GIGA,), "cuda")])
def test_work_runs_on_a_gpu_where_there_is_one(gpus: tuple[int, ...], engine: str) -> None:
    """And on the CPU elsewhere."""
    assert Machine(2, 8 * GIGA, 16 * GIGA, gpus).engine == engine


def test_gpus_are_asked_for_their_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of `nvidia-smi`; a machine without that program has none."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '81000\\n40000\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert free_gpu_bytes() == (81000 * 2**20, 40000 * 2**20)
    program.unlink()
    assert free_gpu_bytes() == ()


@pytest.mark.parametrize(
    "limit,used,inactive,expected",
    [
        (None, 0, 0, 8 * 1024**2 * 1024),
        ("max", 10**9, 0, 8 * 1024**2 * 1024),
        ("4000000000", 10**9, 0, 3 * 10**9),
        ("4000000000", 10**9, 5 * 10**8, 35 * 10**8),
        ("999000000000", 10**9, 0, 8 * 1024**2 * 1024),
    ],
)
def test_what_there_is(tmp_path: Path, limit: str | None, used: int, inactive: int, expected: int) -> None:
    """The machine's available memory, or what a container's limit leaves; cache in it can be given back."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\nHugePages_Total: 0\n")
    if limit is not None:
        group = tmp_path / "sys/fs/cgroup"
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")
    assert available_bytes(tmp_path) == expected


def test_this_machine_has_some() -> None:
    """The real files can be read."""
    assert available_bytes() > 0
