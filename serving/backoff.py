"""How long to wait before a replica is started again."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential pauses with a cap, and no end: a cause such as a full disk or a busy GPU may go away by itself."""

    first_seconds: float = 1.0
    longest_seconds: float = 300.0

    def after_start_failure(self, failures: int) -> float:
        """Return the pause after the n-th failed start in a row (n from 1)."""
        return min(self.longest_seconds, self.first_seconds * 2.0 ** min(failures - 1, 30))

    def after_crash(self, crashes: int) -> float:
        """Return the pause after the n-th crash in a row of a replica that had been ready: none after the first."""
        return 0.0 if crashes <= 1 else self.after_start_failure(crashes - 1)
