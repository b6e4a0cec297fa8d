"""Our side of the benchmark: the solver as the pipeline calls it. `python -m tests.benchmarks.our_solver JOB`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from config.load import process_environment
from quantize.backends.gptqmodel import solve
from quantize.backends.protocol import SolveJob
from quantize.base import read_base
from quantize.planning.recipe import Recipe, installed_backend
from quantize.running.worker import child_environ, run_worker
from quantize.schemes.scheme import preset
from quantize.schemes.settings import SETTINGS
from quantize.stages.checkpoint import writing_job


def main(job_file: str) -> None:
    """Quantize as a job says: `{base, scheme, solver, samples, into}`; when what was done goes to `marks.json`."""
    job = json.loads(Path(job_file).read_bytes())
    into = Path(job["into"])
    work, solved_modules = into.with_name(f"{into.name}-work"), into.with_name(f"{into.name}-solved")
    for folder in (into, work, solved_modules):
        folder.mkdir()
    environ = child_environ(process_environment())
    marks: list[tuple[str, int, float]] = []
    solved = solve(
        recipe_of(job),
        [{"ids": ids, "where": f"sample {number}"} for number, ids in enumerate(job["samples"], 1)],
        SolveJob(solved_modules, work, environ),
        on_progress=lambda done, _: marks.append(("packed", done - 1, time.monotonic())),
        on_event=lambda event: marks.append(("solved", event["layer"], time.monotonic())),
    )
    bits = {module.module: module.bits for module in solved.modules}
    writing = writing_job(recipe_of(job), solved_modules, bits, into)
    run_worker("quantize.backends.writing_child", writing, folder=work, environ=environ, on_progress=lambda *_: None)
    (into.with_name("marks.json")).write_text(json.dumps({"seconds": solved.seconds, "marks": marks}))


def recipe_of(job: dict[str, Any]) -> Recipe:
    """Write the recipe of a job; digests are left out, for nothing here is sealed."""
    return Recipe(
        base=read_base(Path(job["base"]), digested=False),
        scheme=preset(job["scheme"]),
        datasets=(),
        samples=len(job["samples"]),
        max_tokens=max(map(len, job["samples"])),
        seed=0,
        settings=SETTINGS[job["solver"]],
        backend=installed_backend(),
    )


if __name__ == "__main__":
    main(sys.argv[1])
