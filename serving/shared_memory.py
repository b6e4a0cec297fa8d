"""Shared memory that killed processes leave in /dev/shm, where it counts as used until the machine restarts.

vLLM's processes pass messages through named segments (160 to 250 MB each), which their last owner unlinks when it ends
in order. After a SIGKILL nobody does. So what a process has mapped is looked up before it is killed, and unlinked when
no process has it mapped any more.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_PLACE = "/dev/shm/"  # noqa: S108 - not a place to write to
# OpenMP of LLVM and Intel registers itself under its process' number, and has that mapped only at times.
_OPENMP = "__KMP_REGISTERED_LIB_{pid}_*"


def segments_of(pids: Iterable[int]) -> set[Path]:
    """Named segments that processes have mapped (proc(5), maps), or that bear their number."""
    found: set[Path] = set()
    for pid in pids:
        found |= _mapped(pid)
        found.update(Path(_PLACE).glob(_OPENMP.format(pid=pid)))
    return found


def free_segments(segments: set[Path]) -> list[Path]:
    """Unlink those of some segments that no process has mapped; tells which."""
    if not segments:
        return []
    others = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    free = sorted(segments - set().union(*map(_mapped, others)))
    for path in free:
        # Somebody else may have been faster, and what isn't ours stays.
        with suppress(OSError):
            path.unlink()
    return free


def _mapped(pid: int) -> set[Path]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    names = (line.partition(_PLACE)[2] for line in lines if _PLACE in line)
    return {Path(_PLACE, name) for name in names if not name.endswith(" (deleted)")}
