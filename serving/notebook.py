"""What this machine's supervisors run, on disk: a note per replica, from before it begins until it is gone.

A note names its supervisor and the replica's session, each by process number and start time. A number is not given
out again while a process of its session lives (the kernel keeps it), so with the boot's id beside it a note can't
mean anybody else's processes. Notes are how a supervisor finds the replicas of one that was killed.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from serving.errors import StartFailed
from serving.process import kill_session, process_facts, session_processes


@dataclass(frozen=True, slots=True)
class Note:
    """Who runs which replica as which session, at which port; `launch` is the digest of what was started."""

    replica: str
    launch: str
    port: int
    boot: str
    owner: int
    owner_started_ticks: int
    session: int
    session_started_ticks: int


@dataclass(frozen=True, slots=True)
class Notebook:
    """The folder where the supervisors of one user note what they run."""

    folder: Path

    @contextmanager
    def running(self, replica_id: str, launch: str, port: int, session: int) -> Iterator[None]:
        """Note a replica while it runs; StartFailed if that can't be written."""
        path = self._path(session)
        self._write(path, _note(replica_id, launch, port, session))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def sessions(self) -> dict[str, int]:
        """The process of every replica that is noted, which is also its session."""
        notes = [_read(path) for path in sorted(self.folder.glob("*.json"))]
        return {note.replica: note.session for note in notes if note is not None}

    def abandoned(self) -> list[Note]:
        """Notes of sessions that still run though their supervisor is gone; forgets those that mean nobody."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            note = _read(path)
            if note is not None and _owner_lives(note):
                continue
            if note is not None and _session_lives(note):
                found.append(note)
            else:
                path.unlink(missing_ok=True)
        return found

    async def end(self, note: Note) -> None:
        """End every process of a noted session, and forget it."""
        await kill_session(note.session)
        self._path(note.session).unlink(missing_ok=True)

    def _path(self, session: int) -> Path:
        return self.folder / f"{session}.json"

    def _write(self, path: Path, note: Note) -> None:
        """All of a note or none of it: half a one would be an orphan."""
        draft = path.with_suffix(".draft")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(asdict(note)))
            draft.replace(path)
        except OSError as error:
            with suppress(OSError):
                draft.unlink()
            raise StartFailed(f"{note.replica}: {path} can't be written: {error.strerror}; free some space") from error


def _note(replica_id: str, launch: str, port: int, session: int) -> Note:
    owner, leader = process_facts(os.getpid()), process_facts(session)
    assert owner is not None
    # A leader that is gone already leaves nothing that could be mistaken for it.
    started_ticks = leader.started_ticks if leader else -1
    return Note(replica_id, launch, port, _boot_id(), owner.pid, owner.started_ticks, session, started_ticks)


def _read(path: Path) -> Note | None:
    try:
        return Note(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _owner_lives(note: Note) -> bool:
    facts = process_facts(note.owner)
    return note.boot == _boot_id() and facts is not None and facts.started_ticks == note.owner_started_ticks


def _session_lives(note: Note) -> bool:
    leader = process_facts(note.session)
    ours = leader is None or leader.started_ticks == note.session_started_ticks
    return note.boot == _boot_id() and ours and bool(session_processes(note.session))


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
