"""Reads how much main memory this machine has, or the container that this process is in."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED_BYTES = 1 << 62  # cgroup v1 writes a huge number where v2 writes "max"


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory: total, and free or reclaimable without swapping."""

    total_bytes: int
    free_bytes: int


def read_memory(root: Path = Path("/")) -> Memory:
    """Main memory of this machine, or of the container's share of it."""
    kilobytes = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE))
    total, free = int(kilobytes.get("MemTotal", 0)) * 1024, int(kilobytes.get("MemAvailable", 0)) * 1024
    for limit_file, usage_file, statistics in _cgroup_files(root):
        limit, used = _number(limit_file), _number(usage_file)
        if limit is not None and used is not None and limit < _UNLIMITED_BYTES:
            # The page cache counts as used there, but can be reclaimed.
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", _text(statistics), re.MULTILINE)
            left = limit - used + (int(cached[1]) if cached else 0)
            total, free = min(total, limit), max(0, min(free, left))
    return Memory(total, free)


def _cgroup_files(root: Path) -> Iterator[tuple[Path, Path, Path]]:
    """Limit, usage and statistics of every group that this process is in, outermost first: version 2, then 1."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        version_2 = number == "0" and not controllers
        if not version_2 and "memory" not in controllers.split(","):
            continue
        folder = root / "sys/fs/cgroup" / ("" if version_2 else "memory")
        names = ("memory.max", "memory.current") if version_2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        for part in ("", *path.strip("/").split("/")):
            folder = folder / part
            yield folder / names[0], folder / names[1], folder / "memory.stat"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None
