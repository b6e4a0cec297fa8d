"""AutoGPTQ 0.7.1, the last release: solved in an environment of its own."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from config.manifest import Scheme
from quantize.backends.gptqmodel import visible_devices
from quantize.backends.isolation import Pins, isolated_python
from quantize.backends.losses import LossMedians, SolvedModule
from quantize.backends.packing import PACKED
from quantize.backends.protocol import QuantizeResult, SolveJob
from quantize.errors import RecipeError
from quantize.model_files.weight_files import INDEX_FILE, weight_files
from quantize.planning.recipe import Recipe
from quantize.running.worker import run_worker
from quantize.schemes.settings import SETTINGS, SolverSettings
from quantize.variants.checkpoint import write_json

PINS = Pins("auto-gptq 0.7.1", Path(__file__).with_name("autogptq-requirements.txt"), ("3.11",))

_CHILD = "quantize.backends.autogptq_child"


@dataclass(slots=True)
class SolvedModuleCollector:
    """Turns the child's events into solved modules, and passes them on with each loss beside those of its kind."""

    scheme: Scheme
    on_event: Callable[[dict[str, Any]], None]
    solved: list[SolvedModule] = field(default_factory=list)
    medians: LossMedians = field(default_factory=LossMedians)

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event: `module`, `layer`, `loss` and `damp`."""
        self.solved.append(SolvedModule(**event, bits=self.scheme.bits, group_size=self.scheme.group_size))
        self.on_event({**event, "loss_ratio": self.medians.ratio(self.solved[-1])})


def solve(
    recipe: Recipe,
    samples: list[dict[str, Any]],
    solve_job: SolveJob,
    *,
    on_progress: Callable[[int, int], None],
    on_event: Callable[[dict[str, Any]], None],
) -> QuantizeResult:
    """Quantize a recipe's base on token samples with AutoGPTQ; the first time its environment is made before."""
    require_solvable(recipe.scheme, recipe.settings)
    python = isolated_python(PINS, solve_job.environ, solve_job.work / "environment.log")
    base = write_older_base(recipe.base.directory, solve_job.work / "base")
    shutil.rmtree(solve_job.into / PACKED, ignore_errors=True)  # of a run that stopped
    collector = SolvedModuleCollector(recipe.scheme, on_event)
    result = run_worker(
        _CHILD,
        _job(recipe, samples, solve_job, base, python),
        folder=solve_job.work,
        environ=visible_devices(solve_job.environ, recipe.devices.gpus),
        on_progress=on_progress,
        on_event=collector,
    )
    return QuantizeResult.of(result["seconds"], collector.solved)


def require_solvable(scheme: Scheme, settings: SolverSettings) -> None:
    """Raise RecipeError for what AutoGPTQ 0.7.1 has not."""
    if scheme.overrides:
        raise RecipeError(
            "auto-gptq quantizes all modules alike and knows no overrides; drop them, or use --backend gptqmodel"
        )
    if replace(settings, damp=(), true_sequential=True) != replace(SETTINGS["classic"], damp=()):
        raise RecipeError(
            "auto-gptq has no group order, no search for scales, no gptaq and no shrinkage; pass --solver classic, "
            "or use --backend gptqmodel",
        )


def older_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say a model's configuration in transformers 4's words, which that version would otherwise read as defaults.

    A base that transformers 5 saved has `dtype` and `rope_parameters`; code of its own is left out, never run.
    """
    older = {key: value for key, value in config.items() if key not in ("dtype", "rope_parameters", "auto_map")}
    if "dtype" in config:
        older["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        older["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
        older["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return older


def write_older_base(base: Path, into: Path) -> Path:
    """Make a directory that is `base` for transformers 4: links to its weights, and its configuration reworded."""
    into.mkdir()
    index = [base / INDEX_FILE] if (base / INDEX_FILE).is_file() else []
    for file in (*weight_files(base), *index):
        (into / file.name).symlink_to(file.resolve())
    write_json(into / "config.json", older_config(json.loads((base / "config.json").read_bytes())))
    return into


def _job(
    recipe: Recipe, samples: list[dict[str, Any]], solve_job: SolveJob, base: Path, python: Path
) -> dict[str, Any]:
    return {
        "python": str(python),
        "base": str(base.resolve()),
        "bits": recipe.scheme.bits,
        "group_size": recipe.scheme.group_size,
        "true_sequential": recipe.settings.true_sequential,
        "damping": list(recipe.settings.damp),
        "gpus": len(recipe.devices.gpus),
        "memory_bytes": recipe.devices.memory_bytes,
        "samples": [sample["ids"] for sample in samples],
        "where": [sample["where"] for sample in samples],
        "raw": str((solve_job.into / PACKED).resolve()),
    }
