"""Our quantizing against the bare library's, on the same model and token samples, in one run.

`python -m tests.benchmarks.quantize --model DIR` prints a Markdown table for RESULTS.md: seconds and peak memory of
both, each in a process of its own from its start to its end, in an order that alternates; the evaluation apart. The
settings are `classic` unless told otherwise: with them both sides do the same work. Part of `best` is not the library's
(weighted scales, moved weights), which then does what it has by the same names.
`--qwq` quantizes two layers of QwQ-32B's shape on a GPU instead and says what 64 of them would take.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from config.load import process_environment
from quantize.backends.gptqmodel import settings
from quantize.base import read_base
from quantize.calibration.datasets import read_datasets, shipped_files, split_records
from quantize.calibration.samples import Samples, tokenize_samples
from quantize.evaluation.evaluate import EvaluationPlan, evaluate
from quantize.planning.plan import present_engine
from quantize.running.context import RunContext
from quantize.running.progress import ProgressReporter
from quantize.running.worker import child_environ
from quantize.schemes.scheme import preset
from quantize.schemes.settings import SETTINGS
from tests.benchmarks import qwq_shape
from tests.benchmarks.machine import Usage, machine_line, measured

_SIDES = {"ours": "tests.benchmarks.our_solver", "library": "tests.benchmarks.bare_library"}
# What the source article's script took for all of QwQ-32B, on two GPUs of 80 GB: solving and packing.
_ARTICLE_MINUTES = (110, 20)
_TARGET_RATIO = 1.05


@dataclass(frozen=True, slots=True)
class Round:
    """Both sides, measured once."""

    ours: Usage
    library: Usage

    @property
    def ratio(self) -> float:
        """Our time over the library's."""
        return self.ours.seconds / self.library.seconds


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Seconds that the last layer took: until its last module was solved, and from there until it was packed."""

    solving: float
    packing: float


def order_of(number: int) -> tuple[str, str]:
    """Let each side go first in every other round: the second one finds files in memory."""
    return ("ours", "library") if number % 2 == 0 else ("library", "ours")


def rounds_table(rounds: Sequence[Round]) -> str:
    """Write the rounds and their median ratio as Markdown."""
    head = ["| round | ours | library | ratio | our peak | library's peak |", "| --- | --- | --- | --- | --- | --- |"]
    rows = [
        f"| {number} | {one.ours.seconds:.1f} s | {one.library.seconds:.1f} s | {one.ratio:.3f} "
        f"| {one.ours.peak_bytes / 1e6:,.0f} MB | {one.library.peak_bytes / 1e6:,.0f} MB |"
        for number, one in enumerate(rounds, 1)
    ]
    middle = median(one.ratio for one in rounds)
    return "\n".join([*head, *rows, "", f"Median ratio {middle:.3f} (aim: at most {_TARGET_RATIO})."])


def last_layer(marks: Sequence[tuple[str, int, float]]) -> LayerTime:
    """Take the last layer's times from marks `(solved | packed, layer, second)`; it starts where the other ended."""
    last = max(layer for _, layer, _ in marks)
    started = max(second for what, layer, second in marks if what == "packed" and layer == last - 1)
    solved = max(second for what, layer, second in marks if what == "solved" and layer == last)
    packed = max(second for what, layer, second in marks if what == "packed" and layer == last)
    return LayerTime(max(solved - started, 0.0), packed - max(solved, started))


def qwq_table(layer: LayerTime, seconds: float, usage: Usage) -> str:
    """Write a layer's times, times 64, beside the article's."""
    layers = qwq_shape.WHOLE_LAYERS
    solving, packing = _ARTICLE_MINUTES
    return "\n".join(
        [
            "| | a layer | times 64 | the article's script |",
            "| --- | --- | --- | --- |",
            f"| solving | {layer.solving:.1f} s | {layer.solving * layers / 60:.1f} min | {solving} min |",
            f"| packing | {layer.packing:.1f} s | {layer.packing * layers / 60:.1f} min | {packing} min |",
            "",
            f"Two layers with loading and writing: {seconds:.0f} s, peak main memory {usage.peak_bytes / 1e9:.1f} GB.",
        ],
    )


def compare_sides(options: argparse.Namespace, folder: Path) -> str:
    """Run both sides in rounds, then the evaluation of our variant; gives the text of the result."""
    context = RunContext(folder, child_environ(process_environment()), ProgressReporter(sys.stderr))
    samples = drawn_samples(options, context)
    calibration = [sample["ids"] for sample in samples.calibration]
    rounds = [one_round(options, calibration, folder / str(number), number) for number in range(options.rounds)]
    text = [
        f"{machine_line()}; {options.model.name} to `{options.scheme}`, settings {options.solver}, {len(calibration)} "
        f"samples of {sum(map(len, calibration))} tokens, from start to end of each process.",
        rounds_table(rounds),
    ]
    if options.eval_tokens:
        text.append(evaluated(options, samples, folder / "0" / "ours", context))
    return "\n\n".join(text)


def drawn_samples(options: argparse.Namespace, context: RunContext) -> Samples:
    """Draw and tokenize as `quantgate quantize` does."""
    datasets, rows = read_datasets(options.data or shipped_files())
    split = split_records(rows, samples=options.samples, seed=0, datasets=datasets)
    return tokenize_samples(options.model, split, options.max_tokens, context)


def one_round(options: argparse.Namespace, samples: list[list[int]], folder: Path, number: int) -> Round:
    """Run both sides once; both directories stay."""
    folder.mkdir(parents=True)
    usage = {}
    for side in order_of(number):
        usage[side] = run_side(side, job_of(options, samples, folder / side), folder)
        print(f"round {number + 1}, {side}: {usage[side].seconds:.1f} s", file=sys.stderr, flush=True)
    return Round(**usage)


def run_side(side: str, job: dict[str, Any], folder: Path) -> Usage:
    """Start a side's process with its job."""
    job_file = folder / f"{side}.job.json"
    job_file.write_text(json.dumps(job))
    argv = [sys.executable, "-m", _SIDES[side], str(job_file)]
    return measured(argv, child_environ(process_environment()), folder / f"{side}.log")


def job_of(options: argparse.Namespace, samples: list[list[int]], into: Path) -> dict[str, Any]:
    """Tell both sides the same: model, scheme, settings, tokens."""
    scheme, chosen = preset(options.scheme), SETTINGS[options.solver]
    return {
        "base": str(options.model.resolve()),
        "scheme": options.scheme,
        "solver": options.solver,
        "settings": settings(scheme, chosen, read_base(options.model, digested=False).modules),
        "gptaq": chosen.gptaq,
        "samples": samples,
        "into": str(into.resolve()),
    }


def evaluated(options: argparse.Namespace, samples: Samples, variant: Path, context: RunContext) -> str:
    """Evaluate our variant as the pipeline does, and tell the time."""
    started = time.monotonic()
    plan = EvaluationPlan(tokens=options.eval_tokens, prompts=8, seeds=3, new_tokens=128)
    quality = evaluate(variant, options.model, samples.held_out, preset(options.scheme).bits, context, plan=plan)
    seconds = time.monotonic() - started
    return (
        f"Evaluation, apart: {seconds:.1f} s for {quality.tokens} tokens and {plan.prompts} x {plan.seeds} paired "
        f"generations (mean KL {quality.kl_mean:.4f}, top-1 {quality.top1_agreement:.1%})."
    )


def measure_qwq(options: argparse.Namespace, folder: Path) -> str:
    """Build the model, quantize it as the pipeline does, and read a layer's time from the solver's events."""
    options.model, options.scheme = folder / "qwq-shape", "w4a16-g128"
    argv = [sys.executable, "-m", "tests.benchmarks.qwq_shape", str(options.model)]
    measured(argv, child_environ(process_environment()), folder / "qwq-shape.log")
    usage = run_side("ours", job_of(options, qwq_shape.token_samples(), folder / "ours"), folder)
    told = json.loads((folder / "marks.json").read_bytes())
    text = (
        f"{machine_line()}; {qwq_shape.LAYERS} layers of QwQ-32B's shape with random weights, int4 group 128, settings "
        f"{options.solver}, {qwq_shape.SAMPLES} x {qwq_shape.TOKENS} tokens; the last layer."
    )
    return f"{text}\n\n{qwq_table(last_layer(told['marks']), told['seconds'], usage)}"


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    described = argparse.ArgumentParser(prog="python -m tests.benchmarks.quantize", description=__doc__.split("\n")[0])
    add = described.add_argument
    add("--model", type=Path, metavar="DIR")
    add("--data", type=Path, nargs="+", metavar="FILE", help="calibration text (default: the shipped)")
    add("--scheme", default="w4a16-g64")
    add("--solver", choices=tuple(SETTINGS), default="classic")
    add("--samples", type=int, default=16, metavar="N")
    add("--max-tokens", type=int, default=512, metavar="N")
    add("--rounds", type=int, default=2, metavar="N")
    add("--eval-tokens", type=int, default=4000, metavar="N", help="0: no evaluation")
    add("--qwq", action="store_true", help="two layers of QwQ-32B's shape on a GPU instead")
    add("--work", type=Path, metavar="DIR", help="where the variants are written (default: a temporary directory)")
    return described


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the result."""
    options = parser().parse_args(arguments)
    if options.qwq and present_engine() != "cuda":
        print("--qwq needs an NVIDIA GPU, and this machine has none; leave it out", file=sys.stderr)
        return 2
    if not options.qwq and options.model is None:
        print("pass --model DIR, or --qwq on a machine with a GPU", file=sys.stderr)
        return 2
    with TemporaryDirectory(prefix="benchmark-", dir=options.work) as folder:
        measure = measure_qwq if options.qwq else compare_sides
        print(measure(options, Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
