"""Shared memory that killed processes leave in /dev/shm, used until it is unlinked or the machine restarts.

vLLM's processes pass messages through named segments (160 to 250 MB each), which their last owner unlinks at a regular
exit, but not after SIGKILL. So the segments of a process are listed before it is killed, and unlinked when no process
maps them any more.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_PLACE = "/dev/shm/"  # noqa: S108 - not a place to write to
# OpenMP of LLVM and Intel registers itself under its process' number, and has that mapped only at times.
_OPENMP = "__KMP_REGISTERED_LIB_{pid}_*"


def segments_of(pids: Iterable[int]) -> set[Path]:
    """Return the named segments that processes map (proc(5), maps), or that have their id in the name."""
    segments: set[Path] = set()
    for pid in pids:
        segments |= _mapped(pid)
        segments.update(Path(_PLACE).glob(_OPENMP.format(pid=pid)))
    return segments


def free_segments(segments: set[Path]) -> list[Path]:
    """Unlink the segments that no process maps, and return them."""
    if not segments:
        return []
    others = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    free = sorted(segments - set().union(*map(_mapped, others)))
    for path in free:
        # Another process may have unlinked it, and segments of other users stay.
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
