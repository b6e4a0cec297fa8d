"""Replicas that outlived their supervisor: a note on disk per running replica, and a sweep that reads the notes.

Each note names the supervisor by process number and start time, so a sweep never touches a living one's replicas,
and the replica by the token in its processes' environment, so a reused process number is never mistaken for it.
"""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from serving.process import kill_marked


@dataclass(frozen=True, slots=True)
class Notebook:
    """The folder where the supervisors of one user note what they run."""

    folder: Path

    @contextmanager
    def running(self, replica_id: str) -> Iterator[str]:
        """Note a replica before it starts and strike it out after it ended; yields its token."""
        token = uuid.uuid4().hex
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{token}.json"
        note = {"replica": replica_id, "owner": os.getpid(), "owner_started": started_ticks(os.getpid())}
        path.write_text(json.dumps(note))
        try:
            yield token
        finally:
            path.unlink(missing_ok=True)

    async def sweep(self) -> list[str]:
        """End the replicas of supervisors that are gone; names those that still ran."""
        swept = []
        for path in sorted(self.folder.glob("*.json")):
            note = _read(path)
            if note is not None and _owner_lives(note):
                continue
            if await kill_marked(path.stem):
                swept.append(str(note["replica"]) if note else path.stem)
            path.unlink(missing_ok=True)
        return swept


def _read(path: Path) -> dict[str, object] | None:
    with suppress(OSError, ValueError):
        note = json.loads(path.read_text())
        if isinstance(note, dict) and {"replica", "owner", "owner_started"} <= note.keys():
            return note
    return None


def _owner_lives(note: dict[str, object]) -> bool:
    with suppress(OSError):
        return started_ticks(int(str(note["owner"]))) == note["owner_started"]
    return False


def started_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc(5), field 22 of stat)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19])
