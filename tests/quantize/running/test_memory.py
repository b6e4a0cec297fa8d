"""Memory: how much it takes is arithmetic, how much there is the kernel tells."""

from pathlib import Path

import pytest

from quantize.base import read_base
from quantize.running.memory import Machine, present_machine, widest_inputs
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
    rows = "0, H100, 81559, 81000, 570\\n1, H100, 81559, 40000, 570\\n"
    program.write_text(f"#!/bin/sh\nprintf '{rows}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert present_machine().gpu_bytes == (81000 * 2**20, 40000 * 2**20)
    program.unlink()
    assert present_machine().gpu_bytes == ()


def test_this_machine_has_some() -> None:
    """The real files can be read."""
    machine = present_machine()
    assert 0 < machine.memory_bytes <= machine.total_bytes
    assert machine.cores > 0
