"""Replicas that outlived their supervisor: a note on disk per running replica, and a sweep that reads the notes.

A note names the supervisor and the replica's session, each by process number and start time. A number is not given
out again while a process of its session lives (the kernel keeps it), so with the boot's id beside it a note can't
mean anybody else's processes.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from serving.process import kill_session, process_facts, session_processes


@dataclass(frozen=True, slots=True)
class Note:
    """Who runs which replica as which session."""

    replica: str
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
    def running(self, replica_id: str, session: int) -> Iterator[None]:
        """Note a replica while it runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{session}.json"
        path.write_text(json.dumps(asdict(_note(replica_id, session))))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def sessions(self) -> dict[str, int]:
        """The process of every replica that is noted, which is also its session."""
        notes = [_read(path) for path in sorted(self.folder.glob("*.json"))]
        return {note.replica: note.session for note in notes if note is not None}

    async def sweep(self) -> list[str]:
        """End the replicas of supervisors that are gone; names those that still ran."""
        swept = []
        for path in sorted(self.folder.glob("*.json")):
            note = _read(path)
            if note is not None and _owner_lives(note):
                continue
            if note is not None and _session_lives(note):
                await kill_session(note.session)
                swept.append(note.replica)
            path.unlink(missing_ok=True)
        return swept


def _note(replica_id: str, session: int) -> Note:
    owner, leader = process_facts(os.getpid()), process_facts(session)
    assert owner is not None
    # A leader that is gone already leaves nothing that could be mistaken for it.
    started_ticks = leader.started_ticks if leader else -1
    return Note(replica_id, _boot_id(), owner.pid, owner.started_ticks, session, started_ticks)


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
