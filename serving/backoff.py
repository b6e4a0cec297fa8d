"""How long to wait before a replica is started again, and when to give up."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Doubling pauses; a replica that never got ready would fail the same way for ever, so that ends."""

    first_seconds: float = 1.0
    longest_seconds: float = 60.0
    start_failures: int = 3

    def after_start_failure(self, failures: int) -> float | None:
        """Pause after the n-th failure in a row to get ready (n from 1), None to give up."""
        return None if failures >= self.start_failures else self._pause(failures)

    def after_crash(self, crashes: int) -> float:
        """Pause after the n-th crash in a row of a replica that had been ready: none at first, then growing."""
        return 0.0 if crashes <= 1 else self._pause(crashes - 1)

    def _pause(self, count: int) -> float:
        return min(self.longest_seconds, self.first_seconds * 2.0 ** min(count - 1, 30))
