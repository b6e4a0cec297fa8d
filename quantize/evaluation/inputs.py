"""What a parent and its variant are both given: token samples, prompts to continue, questions to answer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from quantize.calibration.thinking import markers_of
from quantize.evaluation.paired_completions import CompletionOutcome
from quantize.evaluation.sampling import Completion, GenerationRequest, SamplingParameters, read_sampling
from quantize.evaluation.spans import Range, flags, is_open, last_prompt
from quantize.evaluation.tasks import question_from


@dataclass(frozen=True, slots=True)
class GenerationTask:
    """Texts that a model is asked for, and how it draws them; none if `requests` is empty."""

    requests: tuple[GenerationRequest, ...]
    sampling: SamplingParameters

    @property
    def most_tokens(self) -> int:
        """The tokens there are to write if no text ends itself."""
        return len(self.requests) * self.sampling.new_tokens


@dataclass(frozen=True, slots=True)
class EvalInputs:
    """Samples of at least two tokens, prompts to continue with every seed, and questions.

    `reasoning` and `answers` are ranges of token indices of each sample; `texts` tells which are bare text.
    """

    samples: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    reasoning: tuple[tuple[Range, ...], ...]
    answers: tuple[Range, ...]
    texts: tuple[bool, ...]
    prompts: GenerationTask
    questions: GenerationTask

    @property
    def tokens(self) -> int:
        """Tokens that are predicted: all but the first of each sample."""
        return sum(len(ids) - 1 for ids in self.samples)

    def subsets(self, number: int) -> dict[str, list[bool]]:
        """Mark the predicted tokens of a sample by the subsets of `config.measurements.ChatMetrics`."""
        size = len(self.samples[number])
        reasoning, answer = flags(self.reasoning[number], size), flags([self.answers[number]], size)
        generated = [self.texts[number] or one or other for one, other in zip(reasoning, answer, strict=True)]
        prompt = [not one for one in generated]
        return {"generated": generated, "prompt": prompt, "reasoning": reasoning, "answer": answer}


def chat_name(sample: Mapping[str, Any]) -> str:
    """Name a chat in metrics and reports: twelve digits of its digest."""
    return str(sample["sha256"][:12])


def prepare(job: Mapping[str, Any], tokenizer: Any) -> EvalInputs:
    """Turn a job of `quantize.evaluation.evaluation_child` into token ids."""
    header = answer_header(tokenizer)
    samples = [sample for sample in job["samples"] if len(sample["ids"]) > 1]
    base, asked = Path(job["base"]), read_sampling(Path(job["base"]), job["new_tokens"])
    prompts = list(islice(_prompts(job["prompted"], tokenizer, header), job["prompts"]))
    return EvalInputs(
        samples=tuple(tuple(sample["ids"]) for sample in samples),
        names=tuple(chat_name(sample) for sample in samples),
        reasoning=tuple(tuple((start, end) for start, end in sample.get("reasoning", ())) for sample in samples),
        answers=tuple(tuple(sample.get("answer", (0, 0))) for sample in samples),
        texts=tuple(bool(sample.get("is_text")) for sample in samples),
        prompts=GenerationTask(
            tuple(
                GenerationRequest(ids, seed, number)
                for seed in range(job["seeds"])
                for number, ids in enumerate(prompts)
            ),
            asked,
        ),
        questions=GenerationTask(
            tuple(
                GenerationRequest(_asked(question, tokenizer), 0, number)
                for number, question in enumerate(job["questions"])
            ),
            greedy(read_sampling(base, job["task_tokens"])),
        ),
    )


def greedy(sampling: SamplingParameters) -> SamplingParameters:
    """The same, always taking the likeliest token."""
    return SamplingParameters(0.0, 1.0, 0, sampling.repetition_penalty, sampling.end_ids, sampling.new_tokens)


def answer_header(tokenizer: Any) -> str:
    """Find what a template writes before an answer; empty where that is unknown."""
    if not tokenizer.chat_template:
        return ""
    chat = [{"role": "user", "content": "?"}]
    bare = tokenizer.apply_chat_template(chat, tokenize=False)
    asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return asked[len(bare) :] if asked.startswith(bare) else ""


def completion_outcome(completion: Completion, request: GenerationRequest, tokenizer: Any) -> CompletionOutcome:
    """See in a reply, and in the prompt it continues, whether a think span was left open."""
    prompt, said = text_of(request.ids, tokenizer), text_of(completion.ids, tokenizer)
    markers = markers_of(tokenizer)
    opened = markers.start if prompt.rstrip().endswith(markers.start) else ""
    return CompletionOutcome(completion.ids, completion.finished, unclosed=is_open(opened + said, markers))


def text_of(ids: Sequence[int], tokenizer: Any) -> str:
    """Decode tokens with everything in them."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _prompts(samples: Sequence[Mapping[str, Any]], tokenizer: Any, header: str) -> Iterator[tuple[int, ...]]:
    """Prompts of the samples, each once."""
    seen: set[tuple[int, ...]] = set()
    for sample in samples:
        prompt = last_prompt(text_of(sample["ids"], tokenizer), header, markers_of(tokenizer))
        ids = () if prompt is None else _ids(prompt, tokenizer)
        if ids and ids not in seen:
            seen.add(ids)
            yield ids


def _asked(question: Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    chat = question_from(question).chat()
    return _ids(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), tokenizer)


def _ids(text: str, tokenizer: Any) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
