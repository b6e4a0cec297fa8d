"""The log file of a replica: truncated in place, since the replica keeps it open and can outlive its supervisor."""

import asyncio
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from config.schema import LogSettings

log = logging.getLogger(__name__)

POLL_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class LogFile:
    """`path`, and set aside before it `path.1` (the newest), `path.2`, ..."""

    path: Path
    settings: LogSettings

    def rotate(self) -> bool:
        """Rotate a log that has grown too long (copy, then truncate); return whether it did.

        Lines that are written in the moment between copy and cut are lost. OSError where there is no room for the
        copy: then the log is cut all the same, since a full disk would stop what matters more.
        """
        size_bytes = self._size_bytes()
        if not self.settings.rotate_bytes or size_bytes <= self.settings.rotate_bytes:
            return False
        try:
            self._set_aside()
        finally:
            os.truncate(self.path, 0)
        return True

    def _set_aside(self) -> None:
        count = self.settings.keep
        if not count:
            return
        for number in range(count - 1, 0, -1):
            older = self._numbered(number)
            if older.exists():
                older.replace(self._numbered(number + 1))
        draft = self.path.with_name(f"{self.path.name}.draft")
        try:
            shutil.copyfile(self.path, draft)
            draft.replace(self._numbered(1))
        finally:
            draft.unlink(missing_ok=True)

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _size_bytes(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0


async def keep_short(folder: Path, settings: LogSettings, replica_ids: Callable[[], Iterable[str]]) -> None:
    """Look after the logs of some replicas for ever; copying happens in a thread."""
    while True:
        await asyncio.sleep(POLL_SECONDS)
        for replica_id in replica_ids():
            try:
                await asyncio.to_thread(LogFile(folder / f"{replica_id}.log", settings).rotate)
            except OSError as error:
                log.warning("the log of %s could not be set aside, it was cut: %s", replica_id, error)
