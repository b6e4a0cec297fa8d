"""Quality per bit: other tools and ours on the same base, calibration chats and held-out chats.

`python -m tests.benchmarks.quality --model DIR --work DIR` makes one model for each contender, in an environment of its
own, measures it against the base by the code that measures our variants, and prints a table for RESULTS.md. Results
are kept in the work folder: a second run makes what is missing, and `--contender NAME` one row alone.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from config.load import process_environment
from config.measurements import ChatMetrics
from quantize.base import read_base
from quantize.calibration.datasets import read_datasets, shipped_files, split_records
from quantize.calibration.samples import Samples, tokenize_samples
from quantize.errors import QuantizeError
from quantize.evaluation.figures import token_figures
from quantize.evaluation.inputs import chat_name
from quantize.running.context import RunContext
from quantize.running.progress import ProgressReporter
from quantize.running.stage_store import stage_store
from quantize.running.worker import child_environ, run_worker
from tests.benchmarks.machine import machine_line, measured
from tests.benchmarks.quality.contenders import Contender, contenders
from tests.benchmarks.quality.environments import Environments
from tests.benchmarks.quality.sizes import bits_per_weight
from tests.benchmarks.quality.table import Figure, Result, table

_ROOT = Path(__file__).resolve().parents[3]
_RESULT = "result.json"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What all contenders share: the base, its digest, the chats and their samples, and where they work.

    `drawn` are the files of the chats and the limit of their tokens, with which our pipeline draws the same samples.
    """

    base: Path
    digest: str
    drawn: Mapping[str, Any]
    samples: Samples
    work: Path
    context: RunContext

    def folder(self, contender: Contender) -> Path:
        """Name the folder of a contender's job, log, model and result."""
        return self.work / self.base.name / contender.name.replace(", ", "-").replace(" ", "-").lower()


def compare(options: argparse.Namespace) -> str:
    """Make and measure what is missing; gives the text of the result."""
    options.work.mkdir(parents=True, exist_ok=True)
    context = RunContext(options.work, child_environ(process_environment()), ProgressReporter(sys.stderr))
    comparison = comparison_of(options, context)
    environments = Environments(options.work / "environments", context.environ)
    every = contenders(options.group_size)
    rows = [one for one in every if not options.contender or wanted(one, every, options.contender)]
    results = [kept_or_made(contender, comparison, environments) for contender in rows]
    return text_of(comparison, results, kept_results(every, comparison))


def wanted(contender: Contender, every: Sequence[Contender], parts: Sequence[str]) -> bool:
    """Whether the command line names a contender: by its whole name, or by a part that is nobody's whole name."""
    name, names = contender.name.lower(), {one.name.lower() for one in every}
    return any(part == name or (part in name and part not in names) for part in map(str.lower, parts))


def comparison_of(options: argparse.Namespace, context: RunContext) -> Comparison:
    """Draw and tokenize as `quantgate quantize` does."""
    datasets, rows = read_datasets(options.data or shipped_files())
    split = split_records(rows, samples=options.samples, seed=0, datasets=datasets)
    samples = tokenize_samples(options.model, split, options.max_tokens, context)
    chosen = Samples(samples.calibration, samples.held_out[: options.eval_chats])
    drawn = {"data": [str(file.resolve()) for file in options.data or ()], "max_tokens": options.max_tokens}
    return Comparison(options.model.resolve(), read_base(options.model).digest, drawn, chosen, options.work, context)


def kept_or_made(contender: Contender, comparison: Comparison, environments: Environments) -> Result:
    """Give a contender's result: the kept one, or that of making and measuring its model; failures are not kept."""
    file = comparison.folder(contender) / _RESULT
    kept = kept_result(file, comparison.samples.held_out)
    if kept is not None:
        return kept
    result = made(contender, comparison, environments)
    print(f"{contender.name}: {result.failure or result.kl_mean}", file=sys.stderr, flush=True)
    if not result.failure:
        file.write_text(result.model_dump_json(indent=1))
    return result


def kept_results(every: Sequence[Contender], comparison: Comparison) -> list[Result]:
    """Read all kept results: a row is also compared with one of ours that was made before."""
    held_out = comparison.samples.held_out
    found = [kept_result(comparison.folder(contender) / _RESULT, held_out) for contender in every]
    return [result for result in found if result is not None]


def kept_result(file: Path, held_out: Sequence[Mapping[str, Any]]) -> Result | None:
    """Read a kept result; None where there is none, or it was measured on other chats."""
    if not file.is_file():
        return None
    try:
        result = Result.model_validate_json(file.read_bytes())
    except ValidationError:  # an earlier form
        return None
    return result if [chat.chat for chat in result.measured] == [chat_name(sample) for sample in held_out] else None


def made(contender: Contender, comparison: Comparison, environments: Environments) -> Result:
    """Make a contender's model and measure it; what fails is a row that says why."""
    folder = comparison.folder(contender)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        seconds = quantized(contender, comparison, environments)
        return result_of(contender, comparison, model_directory(folder / "model"), seconds)
    except subprocess.CalledProcessError as error:
        return Result(contender=contender.name, failure=last_line(folder / "log.txt") or str(error))
    except QuantizeError as error:
        return Result(contender=contender.name, failure=f"not measured: {error}")


def quantized(contender: Contender, comparison: Comparison, environments: Environments) -> float:
    """Make a contender's model unless it is there, of the same job; gives the seconds that its process took."""
    folder = comparison.folder(contender)
    timing, job_file, into = folder / "seconds.json", folder / "job.json", folder / "model"
    job = json.dumps(job_of(contender, comparison, into))
    if timing.is_file() and job_file.read_text() == job:
        return float(json.loads(timing.read_bytes()))
    timing.unlink(missing_ok=True)
    remains = [into, into.with_name("model-work"), into.with_name("model-solved")]
    for directory in remains:
        shutil.rmtree(directory, ignore_errors=True)
    job_file.write_text(job)
    argv = contender.argv(environments.python(contender.environment), str(_ROOT), str(job_file))
    environ = {**comparison.context.environ, **({"PYTHONPATH": str(_ROOT)} if contender.module else {})}
    seconds = measured(argv, environ, folder / "log.txt").seconds
    timing.write_text(json.dumps(seconds))
    return seconds


def job_of(contender: Contender, comparison: Comparison, into: Path) -> dict[str, Any]:
    """Tell a script the base, the token ids of the calibration chats and where they are from, and its options."""
    return {
        **comparison.drawn,
        "base": str(comparison.base),
        "samples": [sample["ids"] for sample in comparison.samples.calibration],
        "into": str(into.resolve()),
        "options": dict(contender.options),
        **contender.options,
    }


def model_directory(into: Path) -> Path:
    """Find what a script wrote: some tools add a folder of their own."""
    return into if (into / "config.json").is_file() else next(iter(sorted(into.glob("*/config.json")))).parent


def result_of(contender: Contender, comparison: Comparison, directory: Path, seconds: float) -> Result:
    """Measure a model and estimate its figures."""
    job = {
        "base": str(comparison.base),
        "base_digest": comparison.digest,
        "directory": str(directory),
        "cache": str(stage_store(comparison.context.environ).root),
        "scratch": str(comparison.work.resolve() / "parents"),
        "samples": comparison.samples.held_out,
    }
    with comparison.context.progress.stage(f"evaluation of {contender.name}", "tokens") as advance:
        told = run_worker(
            "tests.benchmarks.quality.evaluation_child",
            job,
            folder=directory.parent,
            environ=comparison.context.environ,
            on_progress=advance,
        )
    chats = [ChatMetrics.model_validate(chat) for chat in told["chats"]]
    bits = bits_per_weight(directory, comparison.base)
    return Result(
        contender=contender.name,
        seconds=seconds,
        layer_bits=bits.layers,
        file_bits=bits.file,
        against=contender.against,
        measured=tuple(chats),
        **{name: Figure.of(estimate) for name, estimate in token_figures(chats).items()},
    )


def last_line(log: Path) -> str:
    """Give the last line of a log that says something, for a table's cell."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return next((line.strip().replace("|", "/")[:200] for line in reversed(lines) if line.strip()), "")


def text_of(comparison: Comparison, results: Sequence[Result], kept: Sequence[Result]) -> str:
    """Say what was measured on, then the table."""
    calibration = comparison.samples.calibration
    chats = next((result.measured for result in results if result.measured), ())
    held_out = f"{sum(chat.generated.tokens for chat in chats)} generated tokens of {len(chats)} held-out chats"
    return (
        f"{machine_line()}; {comparison.base.name}, calibrated on {len(calibration)} chats of "
        f"{sum(len(sample['ids']) for sample in calibration)} tokens, measured on {held_out}.\n\n{table(results, kept)}"
    )


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    described = argparse.ArgumentParser(prog="python -m tests.benchmarks.quality", description=__doc__.split("\n")[0])
    add = described.add_argument
    add("--model", type=Path, metavar="DIR", required=True)
    add("--work", type=Path, metavar="DIR", required=True, help="environments, models and results; kept")
    add("--contender", nargs="+", metavar="NAME", help="only these; parts of names will do")
    add("--data", type=Path, nargs="+", metavar="FILE", help="chats (default: the shipped)")
    add("--group-size", type=int, choices=(32, 64, 128), default=64)
    add("--samples", type=int, default=128, metavar="N", help="calibration chats")
    add("--max-tokens", type=int, default=2048, metavar="N", help="of a chat")
    add("--eval-chats", type=int, default=96, metavar="N")
    return described


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and print the table."""
    print(compare(parser().parse_args(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
