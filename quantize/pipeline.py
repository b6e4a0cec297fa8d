"""Base + recipe -> calibrate -> quantize -> evaluate -> seal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from config.manifest import Base, Calibration, Manifest, Quality, Quantizer
from quantize.backends.gptqmodel import solve
from quantize.backends.protocol import Solved, Solver
from quantize.base import read_base
from quantize.calibration import Draw, contents_digest, is_held_out, read_sources
from quantize.errors import CalibrationError
from quantize.measurement import EVALUATION_TOKENS, evaluate
from quantize.progress import Stages
from quantize.recipe import Recipe
from quantize.samples import Samples, calibrate, within
from quantize.store import require_space, seal, staging, work_folder
from quantize.weights import read_packing
from quantize.workshop import Workshop


def build_variant(
    recipe: Recipe,
    drawn: Draw,
    out: Path,
    *,
    environ: Mapping[str, str],
    stages: Stages,
    evaluation_tokens: int = EVALUATION_TOKENS,
    solver: Solver = solve,
) -> Manifest:
    """Turn a base into a sealed variant directory; `out` appears whole or not at all."""
    require_space(out, recipe.base.bytes)
    with staging(out) as variant:
        shop = Workshop(work_folder(variant), environ, stages)
        samples = calibrate(recipe.base.directory, drawn, recipe.max_tokens, shop)
        solved = quantize(recipe, samples, solver, variant, shop)
        held_out = within(samples.held_out, evaluation_tokens)
        quality = evaluate(variant, recipe.base.directory, held_out, recipe.scheme.bits, shop)
        return seal(variant, describe(recipe, samples, solved, quality))


def evaluate_directory(
    variant: Path,
    base: Path,
    data: Sequence[Path],
    *,
    environ: Mapping[str, str],
    stages: Stages,
    max_tokens: int,
    evaluation_tokens: int = EVALUATION_TOKENS,
    every_row: bool = False,
) -> Quality:
    """Measure any readable variant against a base, on the held-out rows of `data` or on all of them."""
    bits = read_packing(variant).bits
    read_base(base)
    _, rows = read_sources(data)
    held_out = tuple(row for row in rows if every_row or is_held_out(row))
    if not held_out:
        raise CalibrationError(["no held-out rows to evaluate on; pass more text with --data, or --every-row"])
    with TemporaryDirectory(prefix="quantgate-") as folder:
        shop = Workshop(Path(folder), environ, stages)
        samples = calibrate(base, Draw((), held_out), max_tokens, shop)
        return evaluate(variant, base, within(samples.held_out, evaluation_tokens), bits, shop)


def quantize(recipe: Recipe, samples: Samples, solver: Solver, into: Path, shop: Workshop) -> Solved:
    """Solve for the integers and write the variant's files."""
    with shop.stages.stage("quantize", "layers") as advance:
        return solver(
            recipe,
            samples.calibration,
            into=into,
            work=shop.folder,
            environ=shop.environ,
            on_progress=advance,
        )


def describe(recipe: Recipe, samples: Samples, solved: Solved, quality: Quality) -> dict[str, object]:
    """Write down where a variant comes from, how it was made and how good it is: a manifest without its seal."""
    calibration = Calibration(
        sha256=contents_digest(sample["sha256"] for sample in samples.calibration),
        samples=len(samples.calibration),
        tokens=sum(len(sample["ids"]) for sample in samples.calibration),
        reasoning_tokens=sum(sample["reasoning_tokens"] for sample in samples.calibration),
        max_tokens=recipe.max_tokens,
        seed=recipe.seed,
    )
    quantizer = Quantizer(
        backend=recipe.backend.name,
        version=recipe.backend.version,
        seconds=solved.seconds,
        damp=dict(solved.damp),
        modules=solved.modules,
        fallback_modules=(),
    )
    return {
        "id": recipe.variant_id,
        "base": Base(name=recipe.base.name, digest=recipe.base.digest, dtype=recipe.base.dtype),
        "scheme": recipe.scheme,
        "calibration": calibration,
        "quantizer": quantizer,
        "quality": quality,
    }
