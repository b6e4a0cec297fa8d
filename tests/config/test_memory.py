"""How much main memory there is, from the kernel's own files."""

from pathlib import Path

import pytest

from config.memory import Memory, read_memory


def write(path: Path, text: str) -> None:
    """One of the kernel's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def meminfo(root: Path) -> None:
    """A machine of 16 GiB, 8 of them free."""
    write(root / "proc/meminfo", "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n")


def test_memory_of_a_machine(tmp_path: Path) -> None:
    """Without a container it is what the kernel says."""
    meminfo(tmp_path)
    assert read_memory(tmp_path) == Memory(16 * 2**30, 8 * 2**30)


@pytest.mark.parametrize(
    "group,folder,limit,usage,cached",
    [
        ("0::/pod", "sys/fs/cgroup/pod", "memory.max", "memory.current", "inactive_file"),
        (
            "4:memory:/pod",
            "sys/fs/cgroup/memory/pod",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
)
def test_memory_of_a_container(tmp_path: Path, group: str, folder: str, limit: str, usage: str, cached: str) -> None:
    """A container's limit counts, less what it uses; cache that gives way is no use."""
    meminfo(tmp_path)
    write(tmp_path / "proc/self/cgroup", f"5:devices:/x\n{group}\n")
    write(tmp_path / folder / limit, f"{4 * 2**30}\n")
    write(tmp_path / folder / usage, f"{3 * 2**30}\n")
    write(tmp_path / folder / "memory.stat", f"anon 5\n{cached} {2**30}\n")
    assert read_memory(tmp_path) == Memory(4 * 2**30, 2 * 2**30)


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_a_container_without_a_limit(tmp_path: Path, limit: str) -> None:
    """Both ways to say "no limit" are understood."""
    meminfo(tmp_path)
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    write(tmp_path / "sys/fs/cgroup/memory.max", limit)
    write(tmp_path / "sys/fs/cgroup/memory.current", "5")
    assert read_memory(tmp_path).free_bytes == 8 * 2**30


def test_this_machine_has_some() -> None:
    """The real files can be read."""
    memory = read_memory()
    assert 0 < memory.free_bytes <= memory.total_bytes
