"""Check a manifest's figures without the code that measured them.

`python -m tests.benchmarks.reproduce VARIANT --against BASE [--data FILE ...] [--eval-chats N]` computes mean KL,
top-1 agreement and perplexity ratio of the generated tokens anew and exits with 1 if one differs from the manifest's
by more than 1 %.

What is shared with quantize/: which held-out samples are read, and their token ids; the manifest's
`dataset_sha256` proves that they are the same. What is not: everything after that.
GPTQ is read by GPTQModel's own loader, compressed-tensors by its library, and transformers runs them (in
`library_figures.py`); with `--through vllm`, the figures are those of vLLM's prompt log-probabilities (in
`vllm_figures.py`), in the precision that vLLM computes in. Use that for `w8a8`: the library of compressed-tensors
scales int8 activations to 127.5, engines scale them to 127.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from config.load import process_environment
from config.manifest import Manifest
from config.quality import Quality
from quantize.calibration.datasets import (
    CalibrationSplit,
    contents_digest,
    is_held_out,
    read_datasets,
    shipped_files,
    split_records,
)
from quantize.calibration.samples import tokenize_samples
from quantize.evaluation.evaluate import DEFAULT_PLAN, EvaluationPlan, samples_of
from quantize.running.context import RunContext
from quantize.running.progress import ProgressReporter
from quantize.running.worker import child_environ
from tests.benchmarks.figures import Figures, TokenSample

_TOLERANCE = 0.01
_DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure as the manifest has it and as it was computed anew."""

    name: str
    sealed: float
    again: float

    @property
    def relative(self) -> float:
        """How far apart they are, as a share of the sealed one."""
        if self.again == self.sealed:
            return 0.0
        return abs(self.again - self.sealed) / abs(self.sealed) if self.sealed else float("inf")


def differences(sealed: Quality, again: Figures) -> list[Difference]:
    """Set the figures side by side."""
    return [Difference(name, float(getattr(sealed, name)), float(value)) for name, value in asdict(again).items()]


def table(found: Sequence[Difference]) -> str:
    """Write them as Markdown."""
    rows = [f"| {one.name} | {one.sealed:.6g} | {one.again:.6g} | {one.relative:.3%} |" for one in found]
    return "\n".join(["| figure | manifest | again | difference |", "| --- | --- | --- | --- |", *rows])


def held_out_samples(manifest: Manifest, options: argparse.Namespace) -> list[TokenSample]:
    """Read the samples that the manifest was measured on; exits where the files give others."""
    datasets, rows = read_datasets(options.data or shipped_files())
    seen = manifest.calibration
    held_out = tuple(row for row in rows if is_held_out(row))
    if seen is not None:
        held_out = split_records(rows, samples=seen.samples, seed=seen.seed, datasets=datasets).held_out
    max_tokens = options.max_tokens or (seen.max_tokens if seen else _DEFAULT_MAX_TOKENS)
    with TemporaryDirectory(prefix="reproduce-") as folder:
        context = RunContext(Path(folder), child_environ(process_environment()), ProgressReporter(sys.stderr))
        samples = tokenize_samples(options.against, CalibrationSplit((), held_out), max_tokens, context)
    plan = EvaluationPlan(chats=options.eval_chats, tokens=options.eval_tokens)
    chosen = samples_of(samples.held_out, plan)
    if contents_digest(sample["sha256"] for sample in chosen) != manifest.quality.dataset_sha256:
        sys.exit(
            "reproduce: these files and flags give other samples than the manifest was measured on; "
            "pass those of the variant's own making",
        )
    return [TokenSample(sample["ids"], generated(sample)) for sample in chosen]


def generated(sample: dict[str, Any]) -> list[bool]:
    """Mark the predicted tokens (all but the first) that the model would write itself: reasoning and the answer."""
    spans = [*sample["reasoning"], sample["answer"]]
    places = range(1, len(sample["ids"]))
    return [sample["is_text"] or any(start <= place < end for start, end in spans) for place in places]


def measured(manifest: Manifest, options: argparse.Namespace, samples: list[TokenSample]) -> Figures:
    """Compute the figures by the way that was asked for."""
    if options.through == "library":
        from tests.benchmarks.library_figures import figures_of  # noqa: PLC0415  it loads torch

        return figures_of(options.variant, options.against, samples, storage_format=manifest.scheme.format)
    from tests.benchmarks.vllm_figures import Engine, figures_through_vllm  # noqa: PLC0415

    engine = Engine(options.dtype, options.top)
    return figures_through_vllm(options.variant, options.against, samples, engine)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    described = argparse.ArgumentParser(prog="python -m tests.benchmarks.reproduce", description=__doc__.split("\n")[0])
    add = described.add_argument
    add("variant", type=Path, metavar="VARIANT")
    add("--against", type=Path, metavar="BASE", required=True)
    add("--data", type=Path, nargs="+", metavar="FILE", help="the files of the variant's making (default: the shipped)")
    add("--eval-chats", type=int, default=DEFAULT_PLAN.chats, metavar="N")
    add("--eval-tokens", type=int, metavar="N")
    add("--max-tokens", type=int, metavar="N", help="of a sample (default: the manifest's)")
    add("--through", choices=("library", "vllm"), default="library", help="what reads and runs (default: library)")
    add("--dtype", default="auto", help="what vLLM computes in (default: auto, which is the base's own)")
    add("--top", type=int, default=512, metavar="K", help="log-probabilities a token from vLLM (-1: all; default: 512)")
    return described


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and give the exit code."""
    options: Any = parser().parse_args(arguments)
    manifest = Manifest.read(options.variant)
    found = differences(manifest.quality, measured(manifest, options, held_out_samples(manifest, options)))
    print(f"{manifest.id} against {options.against.name}\n\n{table(found)}")
    return 1 if any(one.relative > _TOLERANCE for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
