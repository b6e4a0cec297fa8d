"""Stage 5, seal: checkpoint and evaluation -> the variant directory with its manifest."""

from dataclasses import asdict
from pathlib import Path

from config.manifest import Base, Calibration, Manifest, Quantizer
from config.measurements import EVALUATION_FILE, read_measurements
from config.quality import Quality
from quantize.backends.protocol import QuantizeResult
from quantize.calibration.datasets import contents_digest
from quantize.calibration.samples import Samples
from quantize.evaluation.evaluate import judged
from quantize.planning.dry_run import lowest_bits
from quantize.planning.recipe import Recipe
from quantize.running.files import link_or_copy
from quantize.running.stage_store import StageResult
from quantize.schemes.makers import is_data_free
from quantize.stages.evaluation import with_recipe_limits
from quantize.stages.solve import SolvedLayers
from quantize.stages.tokens import Tokens
from quantize.stages.variant_run import VariantRun
from quantize.variants.store import seal, staging


def seal_variant(
    run: VariantRun, out: Path, tokens: Tokens, solved: SolvedLayers, checkpoint: StageResult, evaluated: StageResult
) -> Manifest:
    """Put the variant under its name, as a whole or not at all, and let its stages go when others need the room.

    The files are hard links to those of the checkpoint, or copies on another filesystem.
    """
    recipe = run.recipe
    plan = with_recipe_limits(run.options.evaluation, recipe, run.options.allow_fallback)
    with staging(out) as variant:
        for file in checkpoint.files():
            link_or_copy(file, variant / file.name)
        link_or_copy(evaluated.directory / EVALUATION_FILE, variant / EVALUATION_FILE)
        measured = read_measurements(variant)
        assert measured is not None
        quality = judged(measured, variant, tokens.samples.held_out, lowest_bits(recipe.scheme), plan)
        manifest = seal(variant, describe(recipe, tokens.samples, solved.result, quality))
    for key in (solved.key, checkpoint.key, evaluated.key):
        run.store.release(key)
    run.store.trim(run.options.keep_bytes)
    return manifest


def describe(recipe: Recipe, samples: Samples, result: QuantizeResult, quality: Quality) -> dict[str, object]:
    """Describe where a variant comes from, how it was made and how good it is: a manifest without its checksums."""
    taken = samples.calibration
    free = is_data_free(recipe.scheme)
    calibration = Calibration(
        sha256=contents_digest(sample["sha256"] for sample in taken),
        samples=len(taken),
        tokens=sum(len(sample["ids"]) for sample in taken),
        reasoning_tokens=sum(sample["reasoning_tokens"] for sample in taken),
        max_tokens=recipe.max_tokens,
        seed=recipe.seed,
        generated=sum(bool(sample["generated"]) for sample in taken),
        skipped_rows=samples.refused_rows + sum(len(dataset.skipped) for dataset in recipe.datasets),
    )
    quantizer = Quantizer(
        backend=recipe.backend.name,
        version=recipe.backend.version,
        seconds=result.seconds,
        settings={} if free else settings_payload(recipe),
        damp=dict(result.damp),
        modules=len(result.modules),
        fallback_modules=result.fallback_modules,
        experts=result.experts,
    )
    return {
        "id": recipe.variant_id,
        "base": Base(name=recipe.base.name, digest=recipe.base.digest, dtype=recipe.base.dtype),
        "scheme": recipe.scheme,
        "calibration": None if free and recipe.scheme.kv_cache is None else calibration,
        "quantizer": quantizer,
        "quality": quality,
    }


def settings_payload(recipe: Recipe) -> dict[str, str | float | bool]:
    """Give the solver's settings as a manifest has them: numbers, words and booleans only."""
    transforms = {"transforms": " ".join(recipe.transforms)} if recipe.transforms else {}
    return {**asdict(recipe.settings), "damp": " ".join(f"{step:g}" for step in recipe.settings.damp), **transforms}
