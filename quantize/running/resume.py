"""The folder where a run keeps what it has solved, beside its target, so that a stopped run can go on."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantize.errors import BusyError, TargetError

_IDENTITY = "identity"
_LOCK = "lock"


def solving_folder(out: Path) -> Path:
    """Tell where a variant's solved layers are kept while it is made."""
    target = out.resolve()
    return target.parent / f".{target.name}.solving"


def completed_layers(out: Path) -> int:
    """Count the layers that a stopped run left for `--resume`."""
    return len(list(solving_folder(out).glob("layer-*.json")))


@contextmanager
def solving(out: Path, identity: str, *, resume: bool) -> Iterator[Path]:
    """Lend the folder for solved layers to one run at a time; it stays if the body fails after a whole layer.

    `identity` digests everything that decides the layers. With `resume` what an equal run has left is kept;
    TargetError if it was another one's. BusyError: somebody else makes this variant right now.
    """
    folder = solving_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / _LOCK, out):
        _prepare(folder, identity, resume=resume, out=out)
        try:
            yield folder
        except BaseException:
            if completed_layers(out) == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)


def resumed_line(folder: Path) -> str:
    """Say how many layers a run need not solve again, or nothing."""
    layers = len(list(folder.glob("layer-*.json")))
    return f"quantize: goes on after {layers} whole layers" if layers else ""


def _prepare(folder: Path, identity: str, *, resume: bool, out: Path) -> None:
    mark = folder / _IDENTITY
    known = mark.read_text() if mark.is_file() else None
    if resume and known not in (None, identity):
        raise TargetError(
            f"{out}: the run that was stopped had another recipe or text; "
            "run it with the same options, or without --resume to start anew",
        )
    if not resume:
        for path in folder.iterdir():
            if path.name != _LOCK:
                path.unlink()
    mark.write_text(identity)


@contextmanager
def _locked(lock: Path, out: Path) -> Iterator[None]:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{out}: another process makes this variant right now; wait for it, or stop it") from None
        yield
