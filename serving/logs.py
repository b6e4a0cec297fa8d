"""Reading a replica's log while it is written, set aside, or cut."""

import os
import time
from pathlib import Path
from typing import BinaryIO, Protocol

BLOCK_BYTES = 64 * 1024
LOOK_SECONDS = 0.2


class Sink(Protocol):
    """Where bytes go."""

    def write(self, content: bytes, /) -> int:
        """Take bytes."""

    def flush(self) -> None:
        """Pass on what was taken."""


def log_files(folder: Path) -> dict[str, Path]:
    """The logs that there are, by replica; a variant's name may hold a slash."""
    return {str(path.relative_to(folder))[: -len(".log")]: path for path in sorted(folder.rglob("*.log"))}


def read_end(log: BinaryIO, lines: int) -> bytes:
    """Read the last lines and leave the position at the end; a line without an end is one, too."""
    position = log.seek(0, os.SEEK_END)
    tail = b""
    # One more line end than lines is needed to know where the first of them begins.
    while position and tail[:-1].count(b"\n") < lines:
        step = min(BLOCK_BYTES, position)
        position -= step
        log.seek(position)
        tail = log.read(step) + tail
    log.seek(0, os.SEEK_END)
    return b"".join(tail.splitlines(keepends=True)[-lines:]) if lines else b""


def follow_log(log: BinaryIO, path: Path, out: Sink) -> None:
    """Pass on what is written from here on, until interrupted: through cuts, and into the file that comes after.

    A log is cut when it was copied elsewhere, renamed when it is set aside, and goes on when its replica does.
    """
    current = log
    try:
        while True:
            # The order counts: what was written before the file was set aside is read after that is known.
            successor = _successor(current, path)
            _cut_or_grown(current, out)
            if successor is not None:
                if current is not log:
                    current.close()
                current = successor
            else:
                time.sleep(LOOK_SECONDS)
    finally:
        if current is not log:
            current.close()


def _successor(current: BinaryIO, path: Path) -> BinaryIO | None:
    """Open the file that has taken the place of the one we read, if there is one."""
    try:
        there, ours = path.stat(), os.fstat(current.fileno())
        return None if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino) else path.open("rb")
    except FileNotFoundError:
        return None


def _cut_or_grown(current: BinaryIO, out: Sink) -> None:
    if os.fstat(current.fileno()).st_size < current.tell():
        current.seek(0)
    grown = False
    while block := current.read(BLOCK_BYTES):
        out.write(block)
        grown = True
    if grown:
        out.flush()
