"""Child processes: results and errors come back, noise goes to a log, and a crash is one line."""

import os
from pathlib import Path
from typing import Any

import pytest

from quantize.errors import CalibrationError, QuantizeError, SolveError, WorkerError
from quantize.running.worker import child_environ, run_worker
from tests.quantize.command_line import ROOT


def run(folder: Path, job: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Run the test's child on a job."""
    told: list[tuple[int, int]] = []
    result = run_worker(
        "tests.quantize.children",
        job,
        folder=folder,
        environ={**child_environ(os.environ), "PYTHONPATH": str(ROOT)},
        on_progress=lambda done, total: told.append((done, total)),
    )
    return result, told


def test_a_result_comes_back_with_progress_and_without_noise(tmp_path: Path) -> None:
    """The pipe carries ours, the log theirs, and the child has a process group and a folder of its own."""
    result, told = run(tmp_path, {"end": "result", "numbers": [1, 2, 3]})
    assert result == {"sum": 6, "group": True, "folder": str(tmp_path.resolve())}
    assert told == [(1, 2), (2, 2)]
    assert sorted((tmp_path / "children.log").read_text().split("\n")) == ["", "noise on stderr", "noise on stdout"]


@pytest.mark.parametrize(
    "end,kind,message",
    [
        ("solve error", SolveError, "layer 3"),
        ("calibration error", CalibrationError, "f:1: a; f:2: b"),
        ("crash", WorkerError, "children ended with code 1: RuntimeError: out of luck"),
        ("killed", WorkerError, "children was killed .signal 9., most likely for want of memory"),
        ("silent", WorkerError, "children ended with code 0: noise on stderr"),
    ],
)
def test_errors_come_back_as_what_they_are(tmp_path: Path, end: str, kind: type[QuantizeError], message: str) -> None:
    """Expected errors keep their kind; anything else is told by its last line."""
    with pytest.raises(kind, match=message):
        run(tmp_path, {"end": end})


def test_a_childs_environment_is_quick_quiet_and_offline() -> None:
    """Byte-code is kept, GPTQModel gets its two threads, and what the caller set stays."""
    environ = child_environ(
        {"PYTHONDONTWRITEBYTECODE": "1", "A": "b", "GPTQMODEL_CPU_WORKERS": "8", "QUANTGATE_HOME": "/c"}
    )
    assert "PYTHONDONTWRITEBYTECODE" not in environ
    assert (environ["A"], environ["GPTQMODEL_CPU_WORKERS"]) == ("b", "8")
    assert environ["PYTHONPYCACHEPREFIX"] == "/c/bytecode"
    assert environ["HF_HUB_OFFLINE"] == "1"
    assert child_environ({})["GPTQMODEL_CPU_WORKERS"] == "2"
    assert child_environ({})["MALLOC_MMAP_MAX_"] == "0"
    assert child_environ({"MALLOC_MMAP_MAX_": "9"})["MALLOC_MMAP_MAX_"] == "9"
