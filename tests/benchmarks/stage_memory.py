"""The peak memory of each stage of a real run, beside its forecast.

    python -m tests.benchmarks.stage_memory MODEL_DIR [--scheme w4a16-g64] [--work DIR]

Each stage works in a child process. While the run goes on, the peak resident set of every child (`VmHWM` of
/proc/PID/status) is read until it ends; it includes the libraries and the files that are mapped, as the forecast does.
The memory of an evaluation's parts is that of one child, so the largest of them counts.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from config.load import process_environment
from quantize.running.worker import child_environ

# The child of each stage, and the stages of the forecast that it runs.
_CHILDREN = {
    "tokenizing": ("tokenize",),
    "generation_child": ("self-generate",),
    "sensitivity": ("sensitivity",),
    "gptqmodel_child": ("solve",),
    "writing_child": ("write checkpoint",),
    "evaluation_child": ("evaluate: parent reads", "evaluate: variant reads", "evaluate: both write"),
}
_SAMPLE_SECONDS = 0.02
_KILO = 1024


def main() -> int:
    """Run `quantgate quantize` and print a table; the exit code is that of the run."""
    parser = argparse.ArgumentParser(description="Compare the peak memory of each stage with its forecast.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--scheme", default="w4a16-g64")
    parser.add_argument("--work", type=Path, default=Path("stage-memory"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    environ = {**child_environ(process_environment()), "QUANTGATE_HOME": str(options.work / "home")}
    command = [sys.executable, "quantgate.py", "quantize", str(options.model), "--scheme", options.scheme]
    plan = subprocess.run([*command, "--plan", "--json"], env=environ, check=True, capture_output=True)
    with subprocess.Popen([*command, "--out", str(options.work / "variant")], env=environ) as run:
        peaks = watch(run)
    print(table(json.loads(plan.stdout)["stages"], peaks))
    return run.returncode


def watch(run: subprocess.Popen[bytes]) -> dict[str, int]:
    """Give the peak resident bytes of the run's children by the last name of their module, until the run ends."""
    peaks: dict[str, int] = {}
    while run.poll() is None:
        for pid in children_of(run.pid):
            name, peak = _peak(pid)
            peaks[name] = max(peaks.get(name, 0), peak)
        time.sleep(_SAMPLE_SECONDS)
    return peaks


def children_of(parent: int) -> Iterator[int]:
    """List the children of a process."""
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        try:
            yield from map(int, task.read_text().split())
        except OSError:
            continue


def _peak(pid: int) -> tuple[str, int]:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        status = Path(f"/proc/{pid}/status").read_text()
        module = words[words.index(b"-m") + 1].decode()
        peak = next(int(line.split()[1]) * _KILO for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, ValueError, IndexError, StopIteration):  # it has ended, or is about to start
        return "", 0
    return module.rpartition(".")[2], peak


def table(stages: list[dict[str, object]], peaks: dict[str, int]) -> str:
    """Write forecast and peak of every child, and their ratio."""
    forecast = {str(stage["stage"]): _bytes(stage, "host_bytes") + _bytes(stage, "mapped_bytes") for stage in stages}
    rows = ["| child | forecast | peak | ratio |", "| --- | --- | --- | --- |"]
    for child, names in _CHILDREN.items():
        expected = max((forecast[name] for name in names if name in forecast), default=0)
        if child in peaks and expected:
            ratio = peaks[child] / expected
            rows.append(f"| {child} | {expected / 1e6:,.0f} MB | {peaks[child] / 1e6:,.0f} MB | {ratio:.2f} |")
    return "\n".join(rows)


def _bytes(stage: dict[str, object], key: str) -> int:
    value = stage[key]
    return value if isinstance(value, int) else 0


if __name__ == "__main__":
    sys.exit(main())
