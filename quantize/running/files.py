"""Files and directories that survive a power cut, and the processes that write them."""

import os
import shutil
from pathlib import Path


def sync_tree(directory: Path) -> None:
    """Write a directory with all its files to the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def sync(path: Path) -> None:
    """Write a file or the entries of a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where that is another filesystem."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def is_alive(pid: int) -> bool:
    """Tell whether another process of that number runs."""
    if pid == os.getpid():  # left by an earlier process with this number: a process stages a directory once
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
