"""Where and how the child processes of one run work."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantize.running.progress import ProgressReporter
from quantize.running.stage_store import StageStore, stage_store


@dataclass(frozen=True, slots=True)
class RunContext:
    """Scratch folder, environment of the children, and the reader of their progress."""

    folder: Path
    environ: Mapping[str, str]
    progress: ProgressReporter

    @property
    def stages(self) -> StageStore:
        """The results of stages that all runs share."""
        return stage_store(self.environ)
