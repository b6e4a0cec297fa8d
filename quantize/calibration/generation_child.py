"""Answers from the base itself, by transformers: batches of prompts, seeded. Runs as a child process.

Meant for small bases and for machines without a replica: a server answers the same questions many times faster.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.calibration.records import Message
from quantize.calibration.rendering import render_prompt
from quantize.calibration.tokenizing import load_tokenizer, longest_input
from quantize.running.worker import WorkerChannel, run_child

# Keys and values of one batch may take this much at least, and a share of what the weights leave of the GPUs, or of
# the weights' own size on a CPU. None of it depends on the moment, since the batches decide what each seed gives.
_LEAST_CACHE_BYTES = 2 * 10**9
_SHARE_OF_ROOM = 0.7
_SHARE_OF_WEIGHTS = 0.25
LARGEST_BATCH = 64


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A rendered prompt as token ids, its place among the questions, and its seed."""

    place: int
    ids: tuple[int, ...]
    seed: int


def answer_all(job: dict[str, Any], channel: WorkerChannel) -> dict[str, Any]:
    """Child's work: `{base, questions, sampling}`, as dictionaries -> `{answers: [{completion, finished}]}`."""
    from quantize.dense_models import load_base  # noqa: PLC0415

    base, sampling = Path(job["base"]), job["sampling"]
    tokenizer = load_tokenizer(base)
    prompts = [
        TokenizedPrompt(place, _prompt_ids(question, tokenizer), question["seed"])
        for place, question in enumerate(job["questions"])
    ]
    model = load_base(base)
    stops = _stop_ids(model, tokenizer)
    token_bytes = cache_bytes_per_token(model.config.get_text_config().to_dict(), model.dtype.itemsize)
    groups = batches(prompts, sampling["new_tokens"], token_bytes, _cache_bytes(model))
    answers: list[dict[str, Any]] = [{}] * len(prompts)
    steps, before = len(groups) * sampling["new_tokens"], 0
    for group in groups:
        on_step = _Steps(channel, before, steps)
        for prompt, ids in zip(group, _generate(model, group, sampling, stops, on_step), strict=True):
            kept, finished = until_stop(ids, stops)
            answers[prompt.place] = {"completion": _text(kept, tokenizer), "finished": finished}
        before += sampling["new_tokens"]
        channel.progress(before, steps)
    return {"answers": answers}


def cache_room(weight_bytes: int, gpu_bytes: Sequence[int]) -> int:
    """Say how much keys and values may take beside weights on GPUs of those sizes, or on a CPU if there are none."""
    room = _SHARE_OF_ROOM * (sum(gpu_bytes) - weight_bytes) if gpu_bytes else _SHARE_OF_WEIGHTS * weight_bytes
    return max(_LEAST_CACHE_BYTES, int(room))


def batches(
    prompts: Iterable[TokenizedPrompt], new_tokens: int, bytes_per_token: int, cache_bytes: int = _LEAST_CACHE_BYTES
) -> list[list[TokenizedPrompt]]:
    """Put prompts of like length together, as many as the cache has room for; never fewer than one."""
    groups: list[list[TokenizedPrompt]] = []
    for prompt in sorted(prompts, key=lambda prompt: (len(prompt.ids), prompt.place)):
        room = cache_bytes // max(bytes_per_token * (len(prompt.ids) + new_tokens), 1)
        if not groups or len(groups[-1]) >= min(max(room, 1), LARGEST_BATCH):
            groups.append([])
        groups[-1].append(prompt)
    return groups


def cache_bytes_per_token(config: Mapping[str, Any], item_bytes: int) -> int:
    """How many bytes of keys and values a token takes, by a model's configuration and the bytes of a number."""
    heads = config.get("num_attention_heads") or 1
    size = config.get("head_dim") or config.get("hidden_size", 0) // heads
    layers = config.get("num_hidden_layers", 1)
    return int(2 * layers * (config.get("num_key_value_heads") or heads) * size * item_bytes)


def until_stop(ids: Sequence[int], stops: frozenset[int]) -> tuple[list[int], bool]:
    """Cut generated ids before the first stop token, and tell whether there was one."""
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    return (list(ids), False) if end is None else (list(ids[:end]), True)


class _Steps:
    """A stopping criterion that stops nothing: generation calls it after every token, and it tells the progress."""

    def __init__(self, channel: WorkerChannel, before: int, total: int) -> None:
        self._report, self._done, self._total = channel, before, total

    def __call__(self, ids: Any, *_: Any, **__: Any) -> Any:
        import torch  # noqa: PLC0415

        self._done += 1
        self._report.progress(self._done, self._total)
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def _cache_bytes(model: Any) -> int:
    import torch  # noqa: PLC0415

    weights = sum(value.numel() * value.element_size() for value in model.parameters())
    devices = {value.device for value in model.parameters() if value.device.type == "cuda"}
    return cache_room(weights, [torch.cuda.get_device_properties(device).total_memory for device in devices])


def _generate(
    model: Any,
    group: Sequence[TokenizedPrompt],
    sampling: Mapping[str, Any],
    stops: frozenset[int],
    on_step: Callable[..., Any],
) -> list[list[int]]:
    """Continue a batch of prompts, padded on the left, and give back the new ids of each."""
    import torch  # noqa: PLC0415
    from transformers import GenerationConfig, StoppingCriteriaList  # noqa: PLC0415

    torch.manual_seed(group[0].seed)
    width = max(len(prompt.ids) for prompt in group)
    pad = min(stops, default=0)
    ids = torch.tensor([[pad] * (width - len(prompt.ids)) + list(prompt.ids) for prompt in group])
    mask = torch.tensor([[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in group])
    # Everything that a base's own generation_config might change is named here.
    settings = GenerationConfig(
        do_sample=True,
        temperature=sampling["temperature"],
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        max_new_tokens=max(min(sampling["new_tokens"], _room(model, width)), 1),
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
    )
    with torch.inference_mode():
        given = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([on_step]),
        )
    rows: list[list[int]] = given[:, width:].tolist()
    return rows


def _room(model: Any, width: int) -> int:
    return (longest_input(model.config.to_dict()) or sys.maxsize) - width


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    # Special tokens stay: in some models <think> is one.
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _prompt_ids(question: Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    text = render_prompt(list(map(Message.from_dict, question["messages"])), tokenizer, question["tools"])
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    eos_ids = model.generation_config.eos_token_id
    listed = eos_ids if isinstance(eos_ids, list) else [eos_ids]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)


if __name__ == "__main__":
    sys.exit(run_child(answer_all))
