"""Records of the running replicas of this machine's supervisors, on disk: how orphaned replicas are found.

A record names its supervisor and the replica's session, each by process id and start time. The kernel does not reuse
the id of a session while one of its processes lives, so together with the boot id a record cannot match the processes
of another program.
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
class ProcessRecord:
    """A running replica: its session, port and supervisor (`owner`); `launch` is the digest of its launch."""

    replica: str
    launch: str
    port: int
    boot: str
    owner: int
    owner_started_ticks: int
    session: int
    session_started_ticks: int


@dataclass(frozen=True, slots=True)
class ProcessLedger:
    """The folder with the records of the supervisors of one user."""

    folder: Path

    @contextmanager
    def running(self, replica_id: str, launch: str, port: int, session: int) -> Iterator[None]:
        """Record a replica while it runs; StartFailed if the record cannot be written."""
        path = self._path(session)
        self._write(path, _record(replica_id, launch, port, session))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def sessions(self) -> dict[str, int]:
        """Return the session of each recorded replica, which is also the id of its first process."""
        records = [_read(path) for path in sorted(self.folder.glob("*.json"))]
        return {record.replica: record.session for record in records if record is not None}

    def orphaned(self) -> list[ProcessRecord]:
        """Return the records of sessions that still run without their supervisor; remove those of ended ones."""
        orphans = []
        for path in sorted(self.folder.glob("*.json")):
            record = _read(path)
            if record is not None and _owner_lives(record):
                continue
            if record is not None and _session_lives(record):
                orphans.append(record)
            else:
                path.unlink(missing_ok=True)
        return orphans

    async def end(self, record: ProcessRecord) -> None:
        """Kill all processes of a session, and remove its record."""
        await kill_session(record.session)
        self._path(record.session).unlink(missing_ok=True)

    def _path(self, session: int) -> Path:
        return self.folder / f"{session}.json"

    def _write(self, path: Path, record: ProcessRecord) -> None:
        """Write a record atomically: a partial one could not be read, and its replica would be lost."""
        draft = path.with_suffix(".draft")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(asdict(record)))
            draft.replace(path)
        except OSError as error:
            with suppress(OSError):
                draft.unlink()
            raise StartFailed(
                f"{record.replica}: {path} can't be written: {error.strerror}; free some space"
            ) from error


def _record(replica_id: str, launch: str, port: int, session: int) -> ProcessRecord:
    owner, leader = process_facts(os.getpid()), process_facts(session)
    assert owner is not None
    # The first process has ended already: no later one can be mistaken for it.
    started_ticks = leader.started_ticks if leader else -1
    return ProcessRecord(replica_id, launch, port, _boot_id(), owner.pid, owner.started_ticks, session, started_ticks)


def _read(path: Path) -> ProcessRecord | None:
    try:
        return ProcessRecord(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _owner_lives(record: ProcessRecord) -> bool:
    facts = process_facts(record.owner)
    return record.boot == _boot_id() and facts is not None and facts.started_ticks == record.owner_started_ticks


def _session_lives(record: ProcessRecord) -> bool:
    leader = process_facts(record.session)
    is_same = leader is None or leader.started_ticks == record.session_started_ticks
    return record.boot == _boot_id() and is_same and bool(session_processes(record.session))


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
