"""Heavy work in child processes: a job file goes in, JSON lines come out of a pipe, and none outlives its parent.

The lines are `{"progress": [done, total]}` and `{"event": {...}}`, then one of `{"result": {...}}` and
`{"error": {"kind", "message"}}`.
What the libraries print goes to a log file.
"""

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from config.load import home_directory
from quantize.errors import (
    CalibrationError,
    MachineError,
    QuantizeError,
    RecipeError,
    ReplicaError,
    SolveError,
    SpaceError,
    VariantError,
    WeightFileError,
    WorkerError,
)
from quantize.running.interrupt import undisturbed

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PATIENCE_SECONDS = 10.0
_ROOT = Path(__file__).resolve().parents[2]
_KINDS = (
    RecipeError,
    CalibrationError,
    MachineError,
    ReplicaError,
    SolveError,
    VariantError,
    WeightFileError,
    SpaceError,
)
_MEMORY_SIGNAL = -signal.SIGKILL

Work = Callable[[dict[str, Any], "WorkerChannel"], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class WorkerChannel:
    """The child's end of the pipe."""

    stream: TextIOWrapper

    def progress(self, done: int, total: int) -> None:
        """Say how far the work is."""
        self._send({"progress": [done, total]})

    def event(self, value: dict[str, Any]) -> None:
        """Tell something that happened on the way."""
        self._send({"event": value})

    def result(self, value: dict[str, Any]) -> None:
        """Hand the result over; the last thing a child does."""
        self._send({"result": value})

    def error(self, error: QuantizeError) -> None:
        """Hand an expected error over, so that the parent raises it as its own."""
        problems = error.problems if isinstance(error, CalibrationError) else [str(error)]
        self._send({"error": {"kind": type(error).__name__, "problems": problems}})

    def _send(self, line: dict[str, Any]) -> None:
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()


def run_child(work: Work) -> int:
    """The child's main: do `work` on the job file of argv, and die when the parent dies."""
    job_file, descriptor, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _die_with(parent)
    os.set_inheritable(descriptor, False)
    with os.fdopen(descriptor, "w") as stream:
        channel = WorkerChannel(stream)
        try:
            channel.result(work(json.loads(Path(job_file).read_bytes()), channel))
        except _KINDS as error:
            channel.error(error)
            return error.exit_code
        except Exception as error:
            if not is_disk_full(error):
                raise
            channel.error(SpaceError(f"no space left on the disk of {visible(Path(job_file).parent)}; free some"))
            return SpaceError.exit_code
    return 0


def visible(folder: Path) -> Path:
    """Name the folder that a person knows: hidden ones are ours, and gone after an error."""
    return visible(folder.parent) if any(part.startswith(".") for part in folder.parts) else folder


def is_disk_full(error: BaseException) -> bool:
    """Tell whether a write failed for want of space; safetensors says so in words only."""
    return getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error)


def run_worker(
    module: str,
    job: Mapping[str, Any],
    *,
    folder: Path,
    environ: Mapping[str, str],
    on_progress: Callable[[int, int], None],
    on_event: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Run `python -m module` on a job and return its result; its errors are raised here, its noise goes to a log."""
    name = module.rpartition(".")[2]
    job_file, log_file = folder / f"{name}.job.json", folder / f"{name}.log"
    job_file.write_text(json.dumps(job))
    outcome: dict[str, Any] = {}
    with log_file.open("wb") as log, _child(module, job_file, log, environ) as (child, lines):
        for line in lines:
            message = json.loads(line)
            if "progress" in message:
                on_progress(*message["progress"])
            elif "event" in message:
                on_event(message["event"])
            else:
                outcome = message
        code = child.wait()
    if "result" in outcome:
        return dict(outcome["result"])
    raise _as_error(outcome.get("error"), name, code, log_file)


def child_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Build a child's environment: byte-code cached (it starts in half the time), quiet, offline."""
    kept = {key: value for key, value in environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {
        **kept,
        "PYTHONPYCACHEPREFIX": kept.get("PYTHONPYCACHEPREFIX", str(home_directory(environ) / "bytecode")),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), kept.get("PYTHONPATH", "")))),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        # transformers would read all tensors of a model in threads before it places the first.
        "HF_DEACTIVATE_ASYNC_LOAD": "1",
        # GPTQ is many small steps. Beside another busy process, threads that spin while they wait for each other made
        # them 500 times slower on two cores; threads that sleep cost nothing that could be measured.
        "OMP_WAIT_POLICY": kept.get("OMP_WAIT_POLICY", "PASSIVE"),
        # glibc gives each tensor of more than 32 MB back to the kernel and takes it anew: on a virtual machine, clearing
        # its pages took as much time as the arithmetic. Freed memory stays with the child, which ends after its work.
        "MALLOC_MMAP_MAX_": kept.get("MALLOC_MMAP_MAX_", "0"),
        "MALLOC_TRIM_THRESHOLD_": kept.get("MALLOC_TRIM_THRESHOLD_", str(1 << 40)),
        # GPTQModel 7.6.0 starts two loader threads and crashes where it allows itself one (2 cores or fewer).
        "GPTQMODEL_CPU_WORKERS": kept.get("GPTQMODEL_CPU_WORKERS", "2"),
    }


@contextmanager
def _child(
    module: str, job_file: Path, log: Any, environ: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], TextIOWrapper]]:
    reader, writer = os.pipe()
    child = None
    with os.fdopen(reader) as lines:
        try:
            with undisturbed():
                child = _start(module, job_file, log, environ, writer)
            yield child, lines
        finally:
            if child is not None:
                _end(child)


def _start(module: str, job_file: Path, log: Any, environ: Mapping[str, str], writer: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(job_file.resolve()), str(writer), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(writer,),
            env=dict(environ),
            # GPTQModel opens logs/ where it starts.
            cwd=job_file.parent,
            # Ctrl-C at a terminal reaches the parent alone, which then ends the child and cleans up.
            start_new_session=True,
        )
    finally:
        os.close(writer)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is not None:
        return
    # The child holds nothing that it must save: its folder is thrown away.
    os.killpg(child.pid, signal.SIGKILL)
    child.wait(_PATIENCE_SECONDS)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _as_error(payload: dict[str, Any] | None, name: str, code: int, log_file: Path) -> QuantizeError:
    if payload:
        if payload["kind"] == CalibrationError.__name__:
            return CalibrationError(payload["problems"])
        kind = next(kind for kind in _KINDS if kind.__name__ == payload["kind"])
        return kind(payload["problems"][0])
    if code == _MEMORY_SIGNAL:
        return WorkerError(
            f"{name} was killed (signal 9), most likely for want of memory; free some or use a larger machine"
        )
    return WorkerError(f"{name} ended with code {code}: {_last_line(log_file)}")


def _last_line(log_file: Path) -> str:
    lines = log_file.read_text(errors="replace").replace("\r", "\n").split("\n")
    texts = [line.strip() for line in lines if line.strip()]
    return texts[-1][:300] if texts else "it printed nothing"
