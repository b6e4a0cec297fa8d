"""How far a variant is from its parent: both read the same held-out text, and write on from the same prompts.

Runs as a child process with transformers alone, so that the figures owe nothing to the program that quantized.
First the parent runs, if the cache doesn't know what it says, then the variant; never are both in memory.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.calibration.thinking import markers_of
from quantize.calibration.tokenizing import load_tokenizer
from quantize.dense_models import layered_variant, load_variant, reclaim
from quantize.errors import CalibrationError, VariantError
from quantize.evaluation.artefacts import (
    divergence_artefacts,
    golden_artefacts,
    pair_artefacts,
    ratio_artefacts,
    worst_artefacts,
)
from quantize.evaluation.inputs import EvalInputs, completion_outcome, prepare, text_of
from quantize.evaluation.lm_head import find_lm_head
from quantize.evaluation.paired_completions import PairedCompletions, increase_errors, length_ratio, rates
from quantize.evaluation.parent_outputs import ParentCaches, ParentOutputs, read_parent
from quantize.evaluation.sample_metrics import LmHeads, SampleMetrics, read_samples
from quantize.evaluation.sampling import Completion, generate
from quantize.evaluation.spans import flags
from quantize.evaluation.tasks import dataset_digest, is_right, question_from, tally, tally_errors
from quantize.evaluation.token_metrics import percentile, subset_metrics
from quantize.running.worker import WorkerChannel, run_child

# Figures by the names of `config.manifest.Quality`, how sure they are (95 % half widths), and what lies behind them.
_PARTS = ("figures", "errors", "evidence")


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
    """Child's work: a job of `quantize.evaluation.evaluate` -> `{figures, errors, evidence}`."""
    tokenizer = load_tokenizer(Path(job["base"]), chats=bool(job["questions"]))
    inputs = prepare(job, tokenizer)
    if not inputs.tokens:
        raise CalibrationError(["no held-out sample has two tokens or more; pass more text with --data"])
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
        yield token_figures(reading, inputs, tokenizer)
        reclaim()
        if not prompts.requests and not questions.requests:
            return
        model = load_variant(variant, base)
        if prompts.requests:
            texts = generate(model, prompts.requests, prompts.sampling, meter)
            yield generation_figures(parent.texts, texts, inputs, tokenizer)
        if questions.requests:
            answers = generate(model, questions.requests, questions.sampling, meter)
            yield task_figures(parent.answers, answers, job["questions"], tokenizer)


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


def token_figures(reading: SampleMetrics, inputs: EvalInputs, tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Tell the distance on all tokens, on those of reasoning and on those of answers."""
    import torch  # noqa: PLC0415

    every = reading.every
    sizes = [len(ids) for ids in inputs.samples]
    thinking = [flag for size, ranges in zip(sizes, inputs.reasoning, strict=True) for flag in flags(ranges, size)]
    answering = [flag for size, one in zip(sizes, inputs.answers, strict=True) for flag in flags([one], size)]
    figures = {
        **(subset_metrics(every, torch.ones(len(thinking), dtype=torch.bool)) or {}),
        "kl_p99": percentile(every.divergence.sort().values, 0.99),
        "reasoning": subset_metrics(every, torch.tensor(thinking)),
        "answer": subset_metrics(every, torch.tensor(answering)),
    }
    worst, golden = worst_artefacts(reading, inputs, tokenizer), golden_artefacts(reading, inputs)
    evidence = divergence_artefacts(reading) | {"worst": worst, "golden": golden}
    return {"figures": figures, "errors": {}, "evidence": evidence}


def generation_figures(
    ours: Sequence[Completion], theirs: Sequence[Completion], inputs: EvalInputs, tokenizer: Any
) -> dict[str, dict[str, Any]]:
    """Tell how parent and variant wrote on from the same prompts."""
    requests, sampling = inputs.prompts.requests, inputs.prompts.sampling
    pairs = PairedCompletions(
        [
            completion_outcome(completion, request, tokenizer)
            for completion, request in zip(ours, requests, strict=True)
        ],
        [
            completion_outcome(completion, request, tokenizer)
            for completion, request in zip(theirs, requests, strict=True)
        ],
    )
    ratio = length_ratio(pairs)
    seeds = len({request.seed for request in requests})
    generation = {
        "prompts": len(requests) // seeds,
        "seeds": seeds,
        "new_tokens": sampling.new_tokens,
        "length_ratio": ratio.value,
        **rates(pairs),
    }
    return {
        "figures": {"length_ratio": ratio.value, "generation": generation},
        "errors": {"length_ratio": (ratio.high - ratio.low) / 2, **increase_errors(pairs)},
        "evidence": {"length_ratio": ratio_artefacts(ratio), "generations": pair_artefacts(pairs, inputs, tokenizer)},
    }


def task_figures(
    ours: Sequence[Completion], theirs: Sequence[Completion], questions: Sequence[dict[str, Any]], tokenizer: Any
) -> dict[str, dict[str, Any]]:
    """Tell how many questions parent and variant answer rightly."""
    asked, markers = [question_from(told) for told in questions], markers_of(tokenizer)
    parent, variant = (
        [
            is_right(text_of(completion.ids, tokenizer), question.answer, markers)
            for completion, question in zip(said, asked, strict=True)
        ]
        for said in (ours, theirs)
    )
    tasks = tally(parent, variant, dataset_digest(asked))
    return {"figures": {"tasks": tasks.model_dump()}, "errors": tally_errors(parent, variant), "evidence": {}}


if __name__ == "__main__":
    sys.exit(run_child(measure))
