"""How far a variant is from its parent: both read the same held-out text, and write on from the same prompts.

Runs as a child process with transformers alone, so that the figures owe nothing to the program that quantized.
First the parent runs, if the cache doesn't know what it says, then the variant; never are both in memory.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from config.estimates import percentile
from config.measurements import ChatMetrics
from quantize.calibration.tokenizing import load_tokenizer
from quantize.dense_models import layered_variant, load_variant, reclaim
from quantize.errors import CalibrationError, VariantError
from quantize.evaluation.artefacts import (
    divergence_artefacts,
    golden_artefacts,
    worst_artefacts,
)
from quantize.evaluation.completion_measurements import completion_measurements, task_measurements
from quantize.evaluation.inputs import EvalInputs, prepare
from quantize.evaluation.lm_head import find_lm_head
from quantize.evaluation.parent_outputs import ParentCaches, ParentOutputs, read_parent
from quantize.evaluation.sample_metrics import LmHeads, SampleMetrics, read_samples
from quantize.evaluation.sampling import generate
from quantize.evaluation.token_metrics import token_sums
from quantize.running.worker import WorkerChannel, run_child

# Parts of `config.measurements.Measurements`, and what lies behind them.
_PARTS = ("measurements", "evidence")


@dataclass(slots=True)
class Meter:
    """Counts tokens and tells them on."""

    channel: WorkerChannel
    total: int
    done: int = 0

    def announce(self, more: int) -> "Meter":
        """Add work that was not known of."""
        self.total += more
        return self

    def __call__(self, tokens: int) -> None:
        """Count tokens that are done."""
        self.done += tokens
        self.channel.progress(self.done, self.total)


def measure(job: dict[str, Any], channel: WorkerChannel) -> dict[str, Any]:
    """Child's work: a job of `quantize.evaluation.evaluate` -> `{measurements, evidence}`."""
    tokenizer = load_tokenizer(Path(job["base"]), chats=bool(job["questions"]))
    inputs = prepare(job, tokenizer)
    if not inputs.tokens:
        raise CalibrationError(["no held-out sample has two tokens or more; pass more text with --data"])
    if not any(any(inputs.subsets(number)["generated"]) for number in range(len(inputs.samples))):
        raise CalibrationError(["no held-out chat has tokens of its answer; raise --max-tokens, or pass more text"])
    parts = list(_measured(job, inputs, tokenizer, channel))
    return {part: {key: value for one in parts for key, value in one[part].items()} for part in _PARTS}


def _measured(
    job: dict[str, Any], inputs: EvalInputs, tokenizer: Any, channel: WorkerChannel
) -> Iterator[dict[str, dict[str, Any]]]:
    import torch  # noqa: PLC0415

    base, prompts, questions = Path(job["base"]), inputs.prompts, inputs.questions
    meter = Meter(channel, inputs.tokens + prompts.most_tokens + questions.most_tokens)
    parent_caches = ParentCaches(Path(job["cache"]), Path(job["scratch"]), base, job["base_digest"])
    parent = read_parent(inputs, parent_caches, meter.announce)
    variant = Path(job["variant"])
    with torch.inference_mode():
        reading = _read_variant(variant, base, parent, inputs, meter)
        require_finite_metrics(reading, job)
        yield read_measurements(reading, inputs, tokenizer, parent.kl_floor)
        reclaim()
        if not prompts.requests and not questions.requests:
            return
        model = load_variant(variant, base)
        if prompts.requests:
            texts = generate(model, prompts.requests, prompts.sampling, meter)
            yield completion_measurements(parent.texts, texts, inputs, tokenizer)
        if questions.requests:
            answers = generate(model, questions.requests, questions.sampling, meter)
            yield task_measurements(parent.answers, answers, job["questions"], tokenizer)


def _read_variant(variant: Path, base: Path, parent: ParentOutputs, inputs: EvalInputs, meter: Meter) -> SampleMetrics:
    """Let a variant read the samples, one layer of it in memory at a time."""
    layered = layered_variant(variant, base)
    with layered.without_layers() as model:
        lm_heads = LmHeads(parent.lm_head(model, base), find_lm_head(model, inputs.samples[0]))
    with layered.reading() as model:
        return read_samples(model, lm_heads, parent.tensor(), inputs.samples, meter)


def require_finite_metrics(reading: SampleMetrics, job: dict[str, Any]) -> None:
    """Refuse logits that are no numbers, and say whose they are."""
    import torch  # noqa: PLC0415

    every = reading.every
    for whose, values in ((job["base"], every.nll_parent), (job["variant"], every.divergence)):
        if not bool(torch.isfinite(values).all()):
            what = "it can't be a measure" if whose == job["base"] else "quantize it anew"
            raise VariantError(f"{whose}: gives logits that are no numbers; {what}")


def read_measurements(
    reading: SampleMetrics, inputs: EvalInputs, tokenizer: Any, kl_floor: float | None
) -> dict[str, dict[str, Any]]:
    """Give the sums of each sample's tokens, and what is worth looking at."""
    import torch  # noqa: PLC0415

    chats, divergences = [], []
    for number, metrics in enumerate(reading.samples):
        subsets = {name: torch.tensor(marked) for name, marked in inputs.subsets(number).items()}
        sums = {name: token_sums(metrics, marked) for name, marked in subsets.items()}
        chats.append(ChatMetrics(chat=inputs.names[number], positions=len(metrics.divergence), **sums))
        divergences.append(metrics.divergence[subsets["generated"]].tolist())
    p99 = percentile([values for values in divergences if values], 0.99)
    measured = {
        "method": f"transformers {version('transformers')}",
        "chats": [chat.model_dump() for chat in chats],
        "kl_p99": {"value": p99.value, "low": p99.low, "high": p99.high},
        "kl_floor": kl_floor,
    }
    worst, golden = worst_artefacts(reading, inputs, tokenizer), golden_artefacts(reading, inputs)
    return {"measurements": measured, "evidence": divergence_artefacts(reading) | {"worst": worst, "golden": golden}}


if __name__ == "__main__":
    sys.exit(run_child(measure))
