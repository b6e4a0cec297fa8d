"""Stage 3, checkpoint: solved modules -> the variant's weights and configuration, checked against the base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.backends.protocol import QuantizeResult
from quantize.modules import is_expert
from quantize.planning.recipe import Recipe
from quantize.running.stage_store import StageResult, stage_key
from quantize.running.worker import run_worker
from quantize.stages.cache_scales import CacheScales
from quantize.stages.solve import SolvedLayers
from quantize.stages.variant_run import VariantRun
from quantize.variants.checkpoint import write_json
from quantize.variants.lint import require_clean
from quantize.variants.quant_log import QUANT_LOG

_CHILD = "quantize.backends.writing_child"
# Raise this when the same solved layers are written otherwise.
_REVISION = 1


def write(run: VariantRun, solved: SolvedLayers, scales: CacheScales) -> StageResult:
    """Write the files of the variant, all but its evaluation and manifest; VariantError if lint has findings."""
    cache = {"cache_scales": scales.key} if scales.key else {}
    key = stage_key("checkpoint", revision=_REVISION, solve=str(solved.key), **cache)
    if not run.options.resume:
        run.store.forget(key)
    found = run.find(key)
    if found is not None:
        return found
    recipe, context = run.recipe, run.context
    with run.store.staging(key) as staged:
        bits = {module.module: module.bits for module in solved.result.modules}
        job = writing_job(recipe, solved.directory, bits, staged, scales.values)
        with context.progress.stage("checkpoint", "modules") as advance:
            run_worker(_CHILD, job, folder=context.folder, environ=context.environ, on_progress=advance)
        write_quant_log(staged, solved.result)
        require_clean(staged, recipe.base, recipe.scheme)
        return run.store.keep(key, staged, {}, subject=recipe.variant_id, cache=False)


def writing_job(
    recipe: Recipe, solved: Path, bits: Mapping[str, int], into: Path, cache_scales: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Describe to the child what to write; `bits` has those of every module in the folder `solved`."""
    return {
        "base": str(recipe.base.directory.resolve()),
        "solved": str(solved.resolve()),
        "bits": dict(bits),
        "scheme": recipe.scheme.model_dump(mode="json"),
        "damp": recipe.settings.damp[0],
        "into": str(into.resolve()),
        "tree": recipe.base.modules.as_json(),
        "cache_scales": dict(cache_scales or {}),
    }


def write_quant_log(variant: Path, result: QuantizeResult) -> None:
    """Write the quant log: every quantized module with its bits, group size, loss and damping."""
    modules = [
        {
            "module": module.module,
            "bits": module.bits,
            "group_size": module.group_size,
            "loss": module.loss,
            "damp": module.damp,
            "fallback": module.loss is None and not module.undersampled,
            **({"tokens": module.tokens, "undersampled": module.undersampled} if is_expert(module.module) else {}),
        }
        for module in sorted(result.modules, key=lambda module: (module.layer, module.module))
    ]
    write_json(variant / QUANT_LOG, {"modules": modules})
