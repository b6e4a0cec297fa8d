"""Our side of the table: `quantgate quantize` up to its checkpoint. argv[1] is a job.

Defaults, transforms and solver are those that the command line settles on; only evaluation and seal are left out.
"""

import json
import sys
from pathlib import Path
from typing import Any

from config.load import process_environment
from quantize.checks import check_request
from quantize.options import RunOptions
from quantize.pipeline import variant_run
from quantize.planning.flags import quantize_parser
from quantize.planning.plan import plan_variant, present_engine
from quantize.planning.recipe_schema import RecipeFile
from quantize.planning.request import Request
from quantize.planning.resolve import resolve
from quantize.running.files import link_or_copy
from quantize.running.memory import present_machine
from quantize.running.progress import ProgressReporter
from quantize.running.worker import child_environ
from quantize.stages.cache_scales import measure_cache_scales
from quantize.stages.checkpoint import write
from quantize.stages.search import solve_or_search
from quantize.stages.tokens import Tokens, tokenize
from quantize.stages.transform import transform


def main(job_file: str) -> None:
    """Quantize as a job says: `{base, samples, max_tokens, data, into, flags}`; its samples must be those we draw."""
    job = json.loads(Path(job_file).read_bytes())
    request = request_of(job)
    options = RunOptions(child_environ(process_environment()), ProgressReporter(sys.stderr))
    recipe, split = plan_variant(request, check_request(request, options, present_machine()), present_machine())
    with variant_run(recipe, options) as run:
        tokens = tokenize(run, split)
        require_same_samples(tokens, job["samples"])
        solving, solved = solve_or_search(transform(run, tokens), tokens)
        checkpoint = write(solving, solved, measure_cache_scales(solving, tokens)).directory
        request.out.mkdir()
        for file in filter(Path.is_file, checkpoint.iterdir()):
            link_or_copy(file, request.out / file.name)


def request_of(job: dict[str, Any]) -> Request:
    """Write the command line of a job, and settle it as `quantgate quantize` does."""
    sizes = ["--samples", str(len(job["samples"])), "--max-tokens", str(job["max_tokens"])]
    data = [word for file in job["data"] for word in ("--data", file)]
    argv = [job["base"], "--out", job["into"], *sizes, *data, *job["flags"]]
    return resolve(quantize_parser().parse_args(argv), RecipeFile(), present=present_engine())


def require_same_samples(tokens: Tokens, samples: list[list[int]]) -> None:
    """Stop where the pipeline would calibrate on other tokens than all other contenders."""
    if [list(sample["ids"]) for sample in tokens.samples.calibration] != samples:
        raise SystemExit("our_pipeline: the pipeline drew other samples than the benchmark")


if __name__ == "__main__":
    main(sys.argv[1])
