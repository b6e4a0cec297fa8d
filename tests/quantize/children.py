"""A child process for the worker's tests: its job says what it does."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from quantize.errors import CalibrationError, SolveError
from quantize.running.worker import WorkerChannel, run_child


def work(job: dict[str, Any], channel: WorkerChannel) -> dict[str, Any]:
    """Make noise, tell progress, then end the way the job wants."""
    print("noise on stdout")
    print("noise on stderr", file=sys.stderr, flush=True)
    channel.progress(1, 2)
    channel.progress(2, 2)
    match job["end"]:
        case "solve error":
            raise SolveError("layer 3")
        case "calibration error":
            raise CalibrationError(["f:1: a", "f:2: b"])
        case "crash":
            raise RuntimeError("out of luck")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "silent":
            os._exit(0)
    return {"sum": sum(job["numbers"]), "group": os.getpgid(0) == os.getpid(), "folder": str(Path.cwd())}


if __name__ == "__main__":
    sys.exit(run_child(work))
