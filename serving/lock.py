"""One supervisor per home directory: two of them would fight over replicas, notes and logs."""

import fcntl
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.errors import LaunchRefused, LockHeld

LOCK_NAME, IDENTITY_NAME = "supervisor.lock", "supervisor.id"


@contextmanager
def sole_supervisor(home: Path) -> Iterator[str]:
    """Hold a home directory while the block runs, and return the name that its supervisor always has.

    LockHeld names the process that holds it. The kernel gives the lock back when its holder dies, however it dies.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / LOCK_NAME).open("a+")
    except OSError as error:
        raise LaunchRefused(
            f"{home}: can't be written: {error.strerror}; set QUANTGATE_HOME to a folder of yours"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockHeld(_held(home)) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield _identity(home / IDENTITY_NAME)


def _held(home: Path) -> str:
    # A process that has just taken the lock may not have written its id yet.
    pid = (home / LOCK_NAME).read_text().strip()
    holder = f"process {pid}" if pid else "another process"
    remedy = "`quantgate stop` stops it; or set QUANTGATE_HOME to another folder"
    return f"{home}: {holder} already runs the replicas of this home; {remedy}"


def _identity(path: Path) -> str:
    """Return the unique id of this home, which stays the same over restarts."""
    try:
        return path.read_text().strip() or _new_identity(path)
    except FileNotFoundError:
        return _new_identity(path)


def _new_identity(path: Path) -> str:
    name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
    draft = path.with_suffix(".new")
    draft.write_text(name)
    draft.replace(path)
    return name
