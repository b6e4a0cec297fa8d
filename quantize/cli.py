"""`quantgate quantize` and `evaluate`: data on stdout, everything else on stderr."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from config.load import process_environment
from config.manifest import Manifest
from quantize.base import read_base
from quantize.calibration.datasets import shipped_files
from quantize.checks import check_request
from quantize.module_tree import with_module_tree
from quantize.options import RunOptions
from quantize.pipeline import build_variant, evaluate_directory, log_datasets, with_self_generated
from quantize.planning.dry_run import as_json, as_text, dry_run_plan
from quantize.planning.flags import evaluate_parser, quantize_parser
from quantize.planning.plan import (
    calibration_split,
    check_numbers,
    plan_variant,
    present_engine,
    settled_request,
    settled_scheme,
    this_cpu_has_amx,
)
from quantize.planning.recipe_file import load_recipe, purpose_of, shipped_recipes
from quantize.planning.recipe_schema import RecipeFile
from quantize.planning.request import Request
from quantize.planning.resolve import evaluation_max_tokens, evaluation_of, resolve
from quantize.planning.transforms import rounds_activations, unsmoothed_reason
from quantize.report.text_report import quality_line, summary_line
from quantize.running.memory import present_machine
from quantize.running.progress import ProgressReporter
from quantize.running.terminal import DONE, GATE, print_stderr, run_command
from quantize.running.worker import child_environ
from quantize.schemes.makers import is_data_free
from quantize.variants.store import reusable


def quantize_main(argv: list[str]) -> int:
    """`quantgate quantize`: make a variant, or reuse the finished one."""
    options = quantize_parser().parse_args(argv)
    return run_command("quantgate quantize", lambda: _quantize(options))


def evaluate_main(argv: list[str]) -> int:
    """`quantgate evaluate`: measure a variant against a base and print its quality."""
    options = evaluate_parser().parse_args(argv)
    return run_command("quantgate evaluate", lambda: _evaluate(options))


def _quantize(options: argparse.Namespace) -> int:
    if options.recipes:
        return _list_recipes(as_json=options.json)
    recipe = load_recipe(options.recipe) if options.recipe else RecipeFile()
    request = resolve(options, recipe, present=present_engine())
    return _show_plan(request, options) if options.plan else _make(request, options)


def _list_recipes(*, as_json: bool) -> int:
    purposes = {path.stem: purpose_of(path) for path in shipped_recipes()}
    if as_json:
        print(json.dumps([{"name": name, "purpose": purpose} for name, purpose in purposes.items()], indent=2))
    else:
        print("\n".join(f"{name:<16} {purpose}" for name, purpose in purposes.items()))
    return DONE


def _show_plan(request: Request, options: argparse.Namespace) -> int:
    check_numbers(request)
    base = with_module_tree(read_base(request.base, digested=False), child_environ(process_environment()))
    scheme = settled_scheme(request, base)
    datasets, split = calibration_split(request)
    request = settled_request(request, base, scheme)
    plan = dry_run_plan(request, base, scheme, split, present_machine(), datasets=datasets, amx=this_cpu_has_amx())
    print(json.dumps(as_json(plan), indent=2) if options.json else as_text(plan))
    return DONE


def _make(request: Request, options: argparse.Namespace) -> int:
    check_numbers(request)
    with run_log(request.log) as log:
        manifest, out = _made(request, _run_options(request, log))
    print(manifest.to_json() if options.json else summary_line(manifest, out))
    return GATE if options.gate and manifest.quality.verdict != "pass" else DONE


def _made(request: Request, options: RunOptions) -> tuple[Manifest, Path]:
    base = check_request(request, options, present_machine())
    request = with_self_generated(request, base, options)
    recipe, split = plan_variant(request, base, present_machine())
    out = Path(str(request.out).replace("{id}", recipe.variant_id))
    manifest = reusable(out, recipe.variant_id)
    if manifest:
        print_stderr(f"{out}: reused, it already holds {manifest.id}")
        return manifest, out
    if not request.data:
        use = "evaluating" if is_data_free(recipe.scheme) else "calibrating"
        print_stderr(f"no --data given: {use} on the shipped {', '.join(path.name for path in shipped_files())}")
    log_datasets(recipe.datasets, options.progress)
    if recipe.settings.gptaq != request.settings.gptaq:
        why = "the model has experts" if base.modules.has_experts else "the inputs that it keeps don't fit into memory"
        options.progress.log(f"GPTAQ is off: {why}")
    if request.transforms is None and rounds_activations(recipe.scheme) and not recipe.transforms:
        options.progress.log(f"smooth is off: {unsmoothed_reason(base)}")
    return build_variant(recipe, split, out, options), out


def _run_options(request: Request, log: TextIO | None) -> RunOptions:
    return RunOptions(
        environ=child_environ(process_environment()),
        progress=ProgressReporter(sys.stderr, run_log=log),
        evaluation=request.evaluation,
        allow_fallback=request.allow_fallback,
        expert_fallback=request.expert_fallback,
        resume=request.resume,
        keep_bytes=request.keep_bytes,
        gpu=present_engine() == "cuda",
        engine=request.engine,
        tensor_parallel=request.tensor_parallel,
    )


@contextmanager
def run_log(path: Path | None) -> Iterator[TextIO | None]:
    """Open the run's log for more lines, if there is one."""
    if path is None:
        yield None
        return
    with path.open("a", encoding="utf-8") as file:
        yield file


def _evaluate(options: argparse.Namespace) -> int:
    evaluation = evaluation_of(options)
    run_options = RunOptions(child_environ(process_environment()), ProgressReporter(sys.stderr), evaluation)
    quality = evaluate_directory(
        options.variant,
        options.against,
        options.data or shipped_files(),
        run_options,
        max_tokens=evaluation_max_tokens(options, present_engine()),
        every_row=options.every_row,
    )
    print(quality.model_dump_json(indent=2) if options.json else quality_line(quality))
    return GATE if options.gate and quality.verdict != "pass" else DONE
