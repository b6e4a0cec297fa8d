"""Where and how the child processes of one run work."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantize.running.progress import Stages


@dataclass(frozen=True, slots=True)
class Workshop:
    """Scratch folder, environment of the children, and the reader of their progress."""

    folder: Path
    environ: Mapping[str, str]
    stages: Stages
