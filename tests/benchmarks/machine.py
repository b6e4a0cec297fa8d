"""What a figure was measured on, and what one process took."""

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

_KILOBYTE = 1024


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds from start to end, and the most memory that the process or one of its children had."""

    seconds: float
    peak_bytes: int


def measured(argv: Sequence[str], environ: Mapping[str, str], log_file: Path) -> Usage:
    """Run a process to its end; its noise goes to a file, and CalledProcessError says how it failed."""
    started = time.monotonic()
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(environ), cwd=log_file.parent
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, argv, log_file.read_bytes()[-2000:])
    return Usage(seconds, used.ru_maxrss * _KILOBYTE)


def machine_line() -> str:
    """Say date, processor, memory and GPUs in one line."""
    told = [
        f"{datetime.now(UTC):%Y-%m-%d}",
        f"{os.cpu_count()} threads of {_processor()}",
        f"{_memory_gigabytes():.0f} GB",
    ]
    return ", ".join([*told, *_gpus()])


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _memory_gigabytes() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def _gpus() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    return [line.strip() for line in told.splitlines() if line.strip()]
