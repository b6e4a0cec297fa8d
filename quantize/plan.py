"""From what was asked for to a recipe: every check that needs no torch, before any work."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from config.manifest import Engine, Scheme
from quantize.base import BaseModel, read_base
from quantize.calibration import FEWEST_SAMPLES, Draw, draw, read_sources, shipped_files
from quantize.errors import RecipeError
from quantize.recipe import Recipe, installed_backend
from quantize.scheme import misfit, preset, require_engine
from quantize.settings import SETTINGS, SolverSettings

# On two CPU cores a 135M model takes one to two minutes with this many of the shipped chats.
DEFAULT_SAMPLES = 16
DEFAULT_MAX_TOKENS = 2048
_FEWEST_TOKENS = 32
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def plan_variant(
    model: Path,
    scheme: str,
    *,
    engine: Engine,
    data: Sequence[Path] = (),
    samples: int = DEFAULT_SAMPLES,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    seed: int = 0,
    settings: SolverSettings = SETTINGS["best"],
) -> tuple[Recipe, Draw]:
    """Check a request and write down its recipe, with the chats it draws; UsageError says what doesn't fit."""
    chosen = preset(scheme)
    require_engine(chosen, engine)
    _require_ranges(samples, max_tokens, settings.damp)
    base = read_base(model)
    _require_fit(base, chosen)
    sources, rows = read_sources(list(data) or shipped_files())
    drawn = draw(rows, samples=samples, seed=seed)
    return Recipe(base, chosen, sources, samples, max_tokens, seed, settings, installed_backend()), drawn


def present_engine() -> Engine:
    """Tell which engine this machine can run, without importing torch."""
    return "cuda" if _NVIDIA_DRIVER.exists() or shutil.which("nvidia-smi") else "cpu"


def _require_ranges(samples: int, max_tokens: int, damp: Sequence[float]) -> None:
    if samples < FEWEST_SAMPLES:
        raise RecipeError(f"{samples} samples are too few: GPTQ needs {FEWEST_SAMPLES} or more")
    if max_tokens < _FEWEST_TOKENS:
        raise RecipeError(f"{max_tokens} tokens a sample are too few: pass {_FEWEST_TOKENS} or more")
    for step in damp:
        if not 0 < step < 1:
            raise RecipeError(f"damp {step:g} is out of range: pass a number between 0 and 1, like 0.01")


def _require_fit(base: BaseModel, scheme: Scheme) -> None:
    if not base.shapes:
        raise RecipeError(f"{base.directory}: has no linear layers in blocks; GPTQ quantizes decoder models")
    reason = misfit(scheme, base.shapes, base.sizes)
    if reason:
        raise RecipeError(f"{base.directory}: {scheme.name} doesn't fit: {reason}")
