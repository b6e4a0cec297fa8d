"""Text from a model: batched, with noise that belongs to a prompt and a seed and not to a batch.

Two models that get the same prompt and seed draw with the same noise for every step and token, so that they differ
where they think differently, and not by chance.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NUCLEUS_CANDIDATES = 512
_MOST_ROWS = 32
# What keys and values may take of a machine's memory.
_SHARE_FOR_CACHE = 0.1


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How tokens are drawn; temperature 0 always takes the likeliest."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    end_ids: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One text to write: the prompt's token ids, and the seed and number that decide its noise."""

    ids: tuple[int, ...]
    seed: int
    number: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What was written: token ids without the one that ends it, and whether there was one."""

    ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True, slots=True)
class _Noise:
    """Adds each row's own Gumbel noise to what is left of its logits: the largest sum is a fair draw."""

    generators: Sequence[Any]

    def __call__(self, _: Any, scores: Any) -> Any:
        """Take part in transformers' chain of logits processors: scores [rows, V]."""
        import torch  # noqa: PLC0415

        for row, generator in enumerate(self.generators):
            noise = torch.empty(scores.shape[1]).exponential_(generator=generator).clamp_(min=1e-30).log_()
            scores[row] -= noise.to(scores.device)
        return scores


def read_sampling(base: Path, new_tokens: int) -> SamplingParameters:
    """Take a base's own way of sampling from its generation config; else temperature 0.6 and top-p 0.95."""
    generation_config, config = _read_json(base / "generation_config.json"), _read_json(base / "config.json")
    ends = generation_config.get("eos_token_id", config.get("eos_token_id"))
    return SamplingParameters(
        temperature=float(generation_config.get("temperature") or 0.6),
        top_p=float(generation_config.get("top_p") or 0.95),
        top_k=int(generation_config.get("top_k") or 0),
        repetition_penalty=float(generation_config.get("repetition_penalty") or 1.0),
        end_ids=tuple(ends) if isinstance(ends, list) else () if ends is None else (int(ends),),
        new_tokens=new_tokens,
    )


def rows_at_once(token_bytes: int, tokens: int, memory_bytes: int) -> int:
    """How many texts of that many tokens are written together, given the bytes of one token's keys and values."""
    return int(max(1, min(_MOST_ROWS, _SHARE_FOR_CACHE * memory_bytes // (token_bytes * tokens))))


def generate(
    model: Any, requests: Sequence[GenerationRequest], sampling: SamplingParameters, advance: Callable[[int], None]
) -> list[Completion]:
    """Let a model answer all requests, in their order; `advance` hears of every token of every row."""
    longest = max(len(request.ids) for request in requests) + sampling.new_tokens
    rows = rows_at_once(_token_bytes(model), longest, _memory_bytes(model))
    completions: list[Completion] = []
    for first in range(0, len(requests), rows):
        completions += _generate_batch(model, requests[first : first + rows], sampling, advance)
    return completions


def cut(ids: Sequence[int], end_ids: Sequence[int]) -> Completion:
    """Cut a row of generated tokens where it ends itself."""
    for place, token in enumerate(ids):
        if token in end_ids:
            return Completion(tuple(ids[:place]), finished=True)
    return Completion(tuple(ids), finished=False)


def nucleus(scores: Any, top_p: float) -> Any:
    """Rule out (-inf) all but each row's likeliest tokens [rows, V], as few as reach the share `top_p`."""
    import torch  # noqa: PLC0415

    shares = scores.softmax(-1)
    likeliest, places = shares.topk(min(_NUCLEUS_CANDIDATES, shares.shape[-1]))
    if bool((likeliest.sum(-1) < top_p).any()):
        likeliest, places = shares.sort(descending=True)
    before = likeliest.cumsum(-1) - likeliest
    kept = torch.full_like(scores, -torch.inf)
    inside = scores.gather(-1, places).masked_fill(before >= top_p, -torch.inf)
    return kept.scatter(-1, places, inside)


def _generate_batch(
    model: Any, requests: Sequence[GenerationRequest], sampling: SamplingParameters, advance: Callable[[int], None]
) -> list[Completion]:
    import torch  # noqa: PLC0415
    from transformers import GenerationConfig  # noqa: PLC0415

    width = max(len(request.ids) for request in requests)
    padding = sampling.end_ids[0] if sampling.end_ids else 0
    rows = [[padding] * (width - len(request.ids)) + list(request.ids) for request in requests]
    mask = [[0] * (width - len(request.ids)) + [1] * len(request.ids) for request in requests]
    # The model's own config would fill in whatever this one leaves open.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=sampling.new_tokens,
        eos_token_id=list(sampling.end_ids) or None,
        pad_token_id=padding,
        repetition_penalty=sampling.repetition_penalty,
    )
    written = model.generate(
        input_ids=torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        logits_processor=list(_processors(requests, sampling)),
        stopping_criteria=[_Listener(advance)],
    )
    return [cut(row[width:].tolist(), sampling.end_ids) for row in written]


def _processors(
    requests: Sequence[GenerationRequest], sampling: SamplingParameters
) -> Iterator[Callable[[Any, Any], Any]]:
    import torch  # noqa: PLC0415
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper  # noqa: PLC0415

    if sampling.temperature == 0:
        return
    if sampling.temperature != 1:
        yield TemperatureLogitsWarper(sampling.temperature)
    if sampling.top_k:
        yield TopKLogitsWarper(sampling.top_k)
    if sampling.top_p < 1:
        yield lambda _, scores: nucleus(scores, sampling.top_p)
    yield _Noise([torch.Generator().manual_seed(noise_seed(request)) for request in requests])


@dataclass(frozen=True, slots=True)
class _Listener:
    """Hears of every step, as one of transformers' stopping criteria that never stops."""

    advance: Callable[[int], None]

    def __call__(self, ids: Any, _: Any, **__: Any) -> Any:
        """Tell the step's tokens; no row [rows] stops for it."""
        import torch  # noqa: PLC0415

        self.advance(ids.shape[0])
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def _token_bytes(model: Any) -> int:
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)


def _memory_bytes(model: Any) -> int:
    """The memory of the machine or GPU, whatever else uses it now: batches must not depend on the moment."""
    import torch  # noqa: PLC0415

    if model.device.type == "cuda":
        return int(torch.cuda.get_device_properties(model.device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def noise_seed(request: GenerationRequest) -> int:
    """One number for a seed and a prompt; of 32 bits, since torch's generator on a CPU sees no more of it."""
    return int(hashlib.sha256(f"{request.seed}:{request.number}".encode()).hexdigest()[:8], 16)


def _read_json(path: Path) -> Mapping[str, Any]:
    payload: Mapping[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return payload
