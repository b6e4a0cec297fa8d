"""Beside solve: token samples -> the scales of an FP8 KV cache, two for each layer.

They are measured on the base that is solved: a rotation changes values. The weights do not depend on them, so that
variants with and without an FP8 cache share their solved layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from types import MappingProxyType
from typing import Any

from quantize.errors import SolveError
from quantize.planning.recipe import Recipe
from quantize.running.stage_store import StageResult, stage_key
from quantize.running.worker import run_worker
from quantize.schemes.cache_scales import scale_names
from quantize.stages.tokens import Tokens
from quantize.stages.variant_run import VariantRun

_CHILD = "quantize.calibration.cache_scales_child"
# Raise this when the same base and samples give other scales.
_REVISION = 1
_LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True, slots=True)
class CacheScales:
    """Scales by the names that they have on disk; none without an FP8 cache. `key` is that of the measurement."""

    values: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    key: str = ""


def weights_alone(run: VariantRun) -> VariantRun:
    """Return a run for the weights, which are the same with any KV cache."""
    recipe = run.recipe
    return replace(run, recipe=replace(recipe, scheme=recipe.scheme.model_copy(update={"kv_cache": None})))


def measure_cache_scales(run: VariantRun, tokens: Tokens) -> CacheScales:
    """Measure the scales that a scheme with an FP8 cache needs; SolveError for one that is no positive number."""
    if run.recipe.scheme.kv_cache is None:
        return CacheScales()
    job = _job(run.recipe, tokens)
    key = stage_key(
        "cache-scales",
        revision=_REVISION,
        libraries=[metadata.version(name) for name in _LIBRARIES],
        base=run.recipe.base.digest,
        samples=job["samples"],
    )
    if not run.options.resume:
        run.store.forget(key)
    found = run.find(key) or _measured(run, job, key)
    return CacheScales(stored_scales(run.recipe, found.facts["scales"]), str(key))


def stored_scales(recipe: Recipe, measured: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Give measured scales the names that vLLM loads."""
    named = {
        name: scale
        for layer, names in scale_names(recipe.base).items()
        for name, scale in zip(names, measured[layer], strict=True)
    }
    for name, scale in named.items():
        if not (math.isfinite(scale) and scale > 0):
            raise SolveError(f"{name}: {scale} is no scale; check the base and the calibration data")
    return named


def _job(recipe: Recipe, tokens: Tokens) -> dict[str, Any]:
    return {
        "base": str(recipe.base.directory.resolve()),
        "layers": list(scale_names(recipe.base)),
        "samples": [sample["ids"] for sample in tokens.samples.calibration],
    }


def _measured(run: VariantRun, job: dict[str, Any], key: Any) -> StageResult:
    context = run.context
    with run.store.staging(key) as staged, context.progress.stage("KV cache scales", "tokens") as advance:
        result = run_worker(_CHILD, job, folder=context.folder, environ=context.environ, on_progress=advance)
        return run.store.keep(key, staged, {"scales": result["scales"]}, subject=run.recipe.variant_id)
