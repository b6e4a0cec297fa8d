"""Base + recipe -> calibrate -> quantize -> evaluate -> seal."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from config.manifest import Base, Calibration, Manifest, Quality, Quantizer
from quantize.automatic.auto_scheme import resolve_auto
from quantize.backends import autogptq, gptqmodel
from quantize.backends.protocol import Errand, Solved, Solver
from quantize.base import read_base
from quantize.conduct import Conduct
from quantize.errors import CalibrationError, RecipeError
from quantize.measuring.measurement import EVIDENCE_FILE, EvaluationPlan, evaluate
from quantize.planning.outline import lowest_bits
from quantize.planning.recipe import Recipe
from quantize.planning.request import Request, TextFile
from quantize.running.progress import Stages
from quantize.running.resume import resumed_line, solving
from quantize.running.workshop import Workshop
from quantize.schemes.forecast import disk_bytes
from quantize.text import preflight
from quantize.text.calibration import Draw, Source, contents_digest, is_held_out, read_sources, shipped_files
from quantize.text.replica_answers import Sampling
from quantize.text.samples import Samples, calibrate
from quantize.text.self_generation import self_generate
from quantize.variants.checkpoint import write_json
from quantize.variants.lint import require_clean
from quantize.variants.store import require_space, seal, staging, work_folder
from quantize.variants.weights import read_packing

# Not modules.json: vLLM takes that name for a file of sentence-transformers, and doesn't start.
MODULES_FILE = "solved.json"
SOLVERS: Mapping[str, Solver] = MappingProxyType({"gptqmodel": gptqmodel.solve, "auto-gptq": autogptq.solve})


def build_variant(recipe: Recipe, drawn: Draw, out: Path, conduct: Conduct) -> Manifest:
    """Turn a base into a sealed variant directory; `out` appears whole or not at all."""
    require_solvable(recipe)
    require_space(out, disk_bytes(recipe.base, recipe.scheme))
    with staging(out) as variant:
        shop = Workshop(work_folder(variant), conduct.environ, conduct.stages)
        samples = calibrate(recipe.base.directory, drawn, recipe.max_tokens, shop)
        # Evaluation looks at the held-out side itself.
        preflight.check(recipe.base, replace(samples, held_out=[]), shop, gpu=conduct.gpu)
        recipe = settled(recipe, samples, conduct, shop)
        with solving(out, identity_of(recipe, samples), resume=conduct.resume) as solutions:
            errand = Errand(variant, shop.folder, solutions, conduct.environ, conduct.allow_fallback)
            solved = quantize(recipe, samples, errand, conduct)
        write_modules(variant, solved)
        require_clean(variant, recipe.base, recipe.scheme)
        quality = evaluate(
            variant,
            recipe.base.directory,
            samples.held_out,
            lowest_bits(recipe.scheme),
            shop,
            plan=accepting(conduct.evaluation, recipe, conduct.allow_fallback),
            base_digest=recipe.base.digest,
            evidence=variant / EVIDENCE_FILE,
        )
        return seal(variant, describe(recipe, samples, solved, quality))


def evaluate_directory(
    variant: Path,
    base: Path,
    data: Sequence[Path],
    conduct: Conduct,
    *,
    max_tokens: int,
    every_row: bool = False,
    evidence: Path | None = None,
) -> Quality:
    """Measure any readable variant against a base, on the held-out rows of `data` or on all of them."""
    bits = read_packing(variant).bits
    parent = read_base(base)
    sources, rows = read_sources(data)
    say_sources(sources, conduct.stages)
    held_out = tuple(row for row in rows if every_row or is_held_out(row))
    if not held_out:
        raise CalibrationError(["no held-out rows to evaluate on; pass more text with --data, or --every-row"])
    with workshop(conduct) as shop:
        samples = calibrate(base, Draw((), held_out), max_tokens, shop).held_out
        return evaluate(
            variant,
            base,
            samples,
            bits,
            shop,
            plan=conduct.evaluation,
            base_digest=parent.digest,
            evidence=evidence,
        )


def with_own_answers(request: Request, conduct: Conduct) -> Request:
    """Let the base answer prompts of the text where that was asked for; its answers join the calibration text.

    Without text of the user's own the shipped prompts are answered, and the shipped answers only evaluate.
    """
    if request.self_generate == 0:
        return request
    files = request.data or tuple(TextFile(path, weight=0.0) for path in shipped_files())
    _, rows = read_sources([file.path for file in files], max_bad=request.max_bad)
    with workshop(conduct) as shop:
        file = self_generate(
            read_base(request.base),
            rows,
            request.self_generate,
            sampling=Sampling(request.max_tokens),
            seed=request.seed,
            url=request.replica,
            shop=shop,
        )
    return replace(request, data=(*files, TextFile(file)))


def say_sources(sources: Sequence[Source], stages: Stages) -> None:
    """Print what was found in calibration files, and what was skipped."""
    for source in sources:
        for line in source.summary():
            stages.say(line)


@contextmanager
def workshop(conduct: Conduct) -> Iterator[Workshop]:
    """Lend a scratch folder that is gone afterwards."""
    with TemporaryDirectory(prefix="quantgate-") as folder:
        yield Workshop(Path(folder), conduct.environ, conduct.stages)


def quantize(recipe: Recipe, samples: Samples, errand: Errand, conduct: Conduct) -> Solved:
    """Solve for the integers and write the variant's files."""
    solver = SOLVERS[recipe.backend.name]
    resumed = resumed_line(errand.solutions)
    if resumed:
        conduct.stages.say(resumed)
    with conduct.stages.stage("quantize", "layers") as advance:
        return solver(
            recipe,
            samples.calibration,
            errand,
            on_progress=advance,
            on_event=lambda event: conduct.stages.note(module_line(event)),
        )


def identity_of(recipe: Recipe, samples: Samples) -> str:
    """Digest what decides a run's solved layers: the recipe and the very tokens."""
    scheme = recipe.scheme.model_dump(mode="json")  # what a search found is not in the recipe's digest
    told = json.dumps([recipe.digest(), scheme, [sample["ids"] for sample in samples.calibration]])
    return hashlib.sha256(told.encode()).hexdigest()


def module_line(event: Mapping[str, Any]) -> str:
    """Tell a solved module in one line."""
    if event["loss"] is None:
        return f"{event['module']}: rounded to nearest, not solved"
    beside = f", {event['beside_its_kind']:.1f} times its kind's median" if event["beside_its_kind"] else ""
    return f"{event['module']}: loss {event['loss']:.4g}{beside}, damping {event['damp']:g}"


def write_modules(variant: Path, solved: Solved) -> None:
    """Write `solved.json`: every quantized module with its numbers, loss and damping."""
    rows = [
        {
            "module": module.module,
            "bits": module.bits,
            "group_size": module.group_size,
            "loss": module.loss,
            "damp": module.damp,
            "fallback": module.loss is None,
        }
        for module in sorted(solved.modules, key=lambda module: (module.layer, module.module))
    ]
    write_json(variant / MODULES_FILE, {"modules": rows})


def require_solvable(recipe: Recipe) -> None:
    """Raise RecipeError, before any work, for what a recipe's backend has not."""
    if recipe.backend.name != "auto-gptq":
        return
    if recipe.budget:
        raise RecipeError("auto-gptq quantizes all modules alike, and `scheme: auto` doesn't; use --backend gptqmodel")
    autogptq.require_solvable(recipe.scheme, recipe.settings)


def settled(recipe: Recipe, samples: Samples, conduct: Conduct, shop: Workshop) -> Recipe:
    """Search the numbers of a recipe that has a budget for them; any other recipe has its scheme already."""
    if recipe.budget is None:
        return recipe
    scheme = resolve_auto(
        recipe.base,
        samples.calibration,
        recipe.budget,
        conduct.engine,
        shop,
        tensor_parallel=conduct.tensor_parallel,
        settings=recipe.settings,
    )
    return replace(recipe, scheme=scheme)


def accepting(plan: EvaluationPlan, recipe: Recipe, fallbacks: int) -> EvaluationPlan:
    """Limit an evaluation by what was asked for: the divergence of a budget, and rounded modules that are accepted."""
    asked: dict[str, float] = {"fallback_modules": fallbacks} if fallbacks else {}
    if recipe.budget and recipe.budget.max_kl is not None:
        asked["kl_mean"] = recipe.budget.max_kl
    return replace(plan, limits={**asked, **plan.limits})


def describe(recipe: Recipe, samples: Samples, solved: Solved, quality: Quality) -> dict[str, object]:
    """Write down where a variant comes from, how it was made and how good it is: a manifest without its seal."""
    taken = samples.calibration
    calibration = Calibration(
        sha256=contents_digest(sample["sha256"] for sample in taken),
        samples=len(taken),
        tokens=sum(len(sample["ids"]) for sample in taken),
        reasoning_tokens=sum(sample["reasoning_tokens"] for sample in taken),
        max_tokens=recipe.max_tokens,
        seed=recipe.seed,
        generated=sum(bool(sample["generated"]) for sample in taken),
        skipped_rows=samples.refused_rows + sum(len(source.skipped) for source in recipe.sources),
    )
    quantizer = Quantizer(
        backend=recipe.backend.name,
        version=recipe.backend.version,
        seconds=solved.seconds,
        settings=told_settings(recipe),
        damp=dict(solved.damp),
        modules=len(solved.modules),
        fallback_modules=solved.fallback_modules,
    )
    return {
        "id": recipe.variant_id,
        "base": Base(name=recipe.base.name, digest=recipe.base.digest, dtype=recipe.base.dtype),
        "scheme": recipe.scheme,
        "calibration": calibration,
        "quantizer": quantizer,
        "quality": quality,
    }


def told_settings(recipe: Recipe) -> dict[str, str | float | bool]:
    """Tell the solver's settings as a manifest does: numbers, words and booleans only."""
    return {**asdict(recipe.settings), "damp": " ".join(f"{step:g}" for step in recipe.settings.damp)}
