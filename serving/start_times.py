"""Durations of starts by variant, in a file: the reason of a starting replica names the usual duration."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from serving.replica import Launch

log = logging.getLogger(__name__)

STARTS_PER_VARIANT = 5
MAX_VARIANTS = 200


@dataclass(frozen=True, slots=True)
class StartTimes:
    """Durations of successful starts in seconds, by engine and variant; without a file, none are known or recorded."""

    file: Path | None = None

    def usual_seconds(self, launch: Launch) -> float | None:
        """Return the median of the latest starts of a variant; None if there was none."""
        durations = self._read().get(_key(launch))
        return median(durations) if durations else None

    def add(self, launch: Launch, seconds: float) -> None:
        """Keep the duration of one more start; a file that can't be written only loses the estimate."""
        if self.file is None:
            return
        known, key = self._read(), _key(launch)
        latest = [*known.pop(key, []), round(seconds, 1)][-STARTS_PER_VARIANT:]
        entries = dict([*known.items(), (key, latest)][-MAX_VARIANTS:])
        draft = self.file.with_suffix(".draft")
        try:
            draft.write_text(json.dumps(entries))
            draft.replace(self.file)
        except OSError as error:
            log.debug("%s can't be written: %s", self.file, error.strerror)

    def _read(self) -> dict[str, list[float]]:
        try:
            stored = json.loads(self.file.read_text()) if self.file else {}
            return {str(key): [float(seconds) for seconds in durations] for key, durations in stored.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}


def _key(launch: Launch) -> str:
    return f"{launch.engine} {launch.variant.path or launch.variant.name}"
