"""What this machine's supervisors run, on disk: a record per replica, from before it begins until it is gone.

A record names its supervisor and the replica's session, each by process number and start time. A number is not given
out again while a process of its session lives (the kernel keeps it), so with the boot's id beside it a record can't
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
class ProcessRecord:
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
class ProcessLedger:
    """The folder where the supervisors of one user record what they run."""

    folder: Path

    @contextmanager
    def running(self, replica_id: str, launch: str, port: int, session: int) -> Iterator[None]:
        """ProcessRecord a replica while it runs; StartFailed if that can't be written."""
        path = self._path(session)
        self._write(path, _record(replica_id, launch, port, session))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def sessions(self) -> dict[str, int]:
        """The process of every replica that is noted, which is also its session."""
        records = [_read(path) for path in sorted(self.folder.glob("*.json"))]
        return {record.replica: record.session for record in records if record is not None}

    def orphaned(self) -> list[ProcessRecord]:
        """Notes of sessions that still run though their supervisor is gone; forgets those that mean nobody."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            record = _read(path)
            if record is not None and _owner_lives(record):
                continue
            if record is not None and _session_lives(record):
                found.append(record)
            else:
                path.unlink(missing_ok=True)
        return found

    async def end(self, record: ProcessRecord) -> None:
        """End every process of a noted session, and forget it."""
        await kill_session(record.session)
        self._path(record.session).unlink(missing_ok=True)

    def _path(self, session: int) -> Path:
        return self.folder / f"{session}.json"

    def _write(self, path: Path, record: ProcessRecord) -> None:
        """All of a record or none of it: half a one would be an orphan."""
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
    # A leader that is gone already leaves nothing that could be mistaken for it.
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
    ours = leader is None or leader.started_ticks == record.session_started_ticks
    return record.boot == _boot_id() and ours and bool(session_processes(record.session))


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
