"""Virtual environments of the contenders: made once, and kept while their requirements stay the same."""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.quality.contenders import Environment


@dataclass(frozen=True, slots=True)
class Environments:
    """Owns the folder that the environments lie in."""

    folder: Path
    environ: Mapping[str, str]

    def python(self, environment: Environment) -> str:
        """Give an environment's Python and install it first where needed; CalledProcessError if pip fails."""
        if not environment.requirements:
            return sys.executable
        place = self.folder / environment.name
        stamp, wanted = place / "installed.txt", "\n".join(environment.requirements)
        if not stamp.is_file() or stamp.read_text() != wanted:
            self._install(environment, place)
            stamp.write_text(wanted)
        return str(place / "bin" / "python")

    def _install(self, environment: Environment, place: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True, env=dict(self.environ))
        pip = [str(place / "bin" / "python"), "-m", "pip", "install", *environment.requirements]
        with place.with_suffix(".log").open("wb") as log:
            subprocess.run(pip, check=True, stdout=log, stderr=log, env=dict(self.environ))
