"""How far a variant is from its parent: both read the same held-out text, and write on from the same prompts.

Runs as a child process with transformers alone, so that the figures owe nothing to the program that quantized.
First the parent runs, if the cache doesn't know what it says, then the variant; never are both in memory.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.dense_models import load_variant
from quantize.errors import CalibrationError, VariantError
from quantize.measuring.divergence import percentile, restricted
from quantize.measuring.evidence import divergences_told, golden_told, pairs_told, ratio_told, worst_told
from quantize.measuring.material import Material, as_generated, prepare, text_of
from quantize.measuring.pairing import Pairs, increase_errors, length_ratio, rates
from quantize.measuring.parent_side import Archive, read_parent
from quantize.measuring.reading import Reading, Readouts, read_samples
from quantize.measuring.readout import find_readout
from quantize.measuring.sampling import Reply, write_texts
from quantize.measuring.spans import flags
from quantize.measuring.tasks import dataset_digest, is_right, question_from, tally, tally_errors
from quantize.running.worker import Report, run_child
from quantize.text.thinking import markers_of
from quantize.text.tokenizing import load_tokenizer

# Figures by the names of `config.manifest.Quality`, how sure they are (95 % half widths), and what lies behind them.
_PARTS = ("figures", "errors", "evidence")


@dataclass(slots=True)
class Meter:
    """Counts tokens and tells them on."""

    report: Report
    total: int
    done: int = 0

    def announce(self, more: int) -> "Meter":
        """Add work that was not known of."""
        self.total += more
        return self

    def __call__(self, tokens: int) -> None:
        """Count tokens that are done."""
        self.done += tokens
        self.report.progress(self.done, self.total)


def measure(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Child's work: a job of `quantize.measuring.measurement` -> `{figures, errors, evidence}`."""
    tokenizer = load_tokenizer(Path(job["base"]), chats=bool(job["questions"]))
    material = prepare(job, tokenizer)
    if not material.tokens:
        raise CalibrationError(["no held-out sample has two tokens or more; pass more text with --data"])
    told = list(_measured(job, material, tokenizer, report))
    return {part: {key: value for one in told for key, value in one[part].items()} for part in _PARTS}


def _measured(
    job: dict[str, Any], material: Material, tokenizer: Any, report: Report
) -> Iterator[dict[str, dict[str, Any]]]:
    import torch  # noqa: PLC0415

    base, prompts, questions = Path(job["base"]), material.prompts, material.questions
    meter = Meter(report, material.tokens + prompts.most_tokens + questions.most_tokens)
    archive = Archive(Path(job["cache"]), Path(job["scratch"]), base, job["base_digest"])
    parent = read_parent(material, archive, meter.announce)
    model = load_variant(Path(job["variant"]), base)
    with torch.inference_mode():
        readouts = Readouts(parent.readout(model, base), find_readout(model, material.samples[0]))
        reading = read_samples(model, readouts, parent.tensor(), material.samples, meter)
        require_numbers(reading, job)
        yield distances_told(reading, material, tokenizer)
        if prompts.requests:
            texts = write_texts(model, prompts.requests, prompts.sampling, meter)
            yield generations_told(parent.texts, texts, material, tokenizer)
        if questions.requests:
            answers = write_texts(model, questions.requests, questions.sampling, meter)
            yield answers_told(parent.answers, answers, job["questions"], tokenizer)


def require_numbers(reading: Reading, job: dict[str, Any]) -> None:
    """Refuse logits that are no numbers, and say whose they are."""
    import torch  # noqa: PLC0415

    every = reading.every
    for whose, values in ((job["base"], every.nll_parent), (job["variant"], every.divergence)):
        if not bool(torch.isfinite(values).all()):
            what = "it can't be a measure" if whose == job["base"] else "quantize it anew"
            raise VariantError(f"{whose}: gives logits that are no numbers; {what}")


def distances_told(reading: Reading, material: Material, tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Tell the distance on all tokens, on those of reasoning and on those of answers."""
    import torch  # noqa: PLC0415

    every = reading.every
    sizes = [len(ids) for ids in material.samples]
    thinking = [flag for size, ranges in zip(sizes, material.reasoning, strict=True) for flag in flags(ranges, size)]
    answering = [flag for size, one in zip(sizes, material.answers, strict=True) for flag in flags([one], size)]
    figures = {
        **(restricted(every, torch.ones(len(thinking), dtype=torch.bool)) or {}),
        "kl_p99": percentile(every.divergence.sort().values, 0.99),
        "reasoning": restricted(every, torch.tensor(thinking)),
        "answer": restricted(every, torch.tensor(answering)),
    }
    worst, golden = worst_told(reading, material, tokenizer), golden_told(reading, material)
    evidence = divergences_told(reading) | {"worst": worst, "golden": golden}
    return {"figures": figures, "errors": {}, "evidence": evidence}


def generations_told(
    ours: Sequence[Reply], theirs: Sequence[Reply], material: Material, tokenizer: Any
) -> dict[str, dict[str, Any]]:
    """Tell how parent and variant wrote on from the same prompts."""
    requests, sampling = material.prompts.requests, material.prompts.sampling
    pairs = Pairs(
        [as_generated(reply, request, tokenizer) for reply, request in zip(ours, requests, strict=True)],
        [as_generated(reply, request, tokenizer) for reply, request in zip(theirs, requests, strict=True)],
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
        "evidence": {"length_ratio": ratio_told(ratio), "generations": pairs_told(pairs, material, tokenizer)},
    }


def answers_told(
    ours: Sequence[Reply], theirs: Sequence[Reply], questions: Sequence[dict[str, Any]], tokenizer: Any
) -> dict[str, dict[str, Any]]:
    """Tell how many questions parent and variant answer rightly."""
    asked, markers = [question_from(told) for told in questions], markers_of(tokenizer)
    parent, variant = (
        [
            is_right(text_of(reply.ids, tokenizer), question.answer, markers)
            for reply, question in zip(said, asked, strict=True)
        ]
        for said in (ours, theirs)
    )
    tasks = tally(parent, variant, dataset_digest(asked))
    return {"figures": {"tasks": tasks.model_dump()}, "errors": tally_errors(parent, variant), "evidence": {}}


if __name__ == "__main__":
    sys.exit(run_child(measure))
