"""From a model's last hidden states to its logits: the one matrix that turns the small thing into the large one.

The states of a token are some hundred times smaller than its logits, and the output matrix is not quantized. So a
parent is kept as its states, and its logits are made again, a slice of the vocabulary at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quantize.model_files.weight_files import weight_files

# Positions per forward pass, padding included; a longer sample has a pass of its own. Every pass reads all weights.
PASS_TOKENS = 8192
# Where a pass gives logits (V of them a position) instead of states.
_LOGITS_PASS_TOKENS = 1024
_PROBE_TOKENS = 32
# Between the same product with other block sizes, as a share of the largest logit; bf16 rounds to 2^-8.
_TOLERANCE: Mapping[int, float] = {4: 1e-5, 2: 2**-6}


@dataclass(frozen=True, slots=True)
class LmHead:
    """logits = softcap(scale * (states @ weight.T + bias)); without a weight, the states are the logits themselves."""

    weight: Any
    bias: Any
    scale: float
    cap: float

    def logits(self, states: Any, first: int, last: int) -> Any:
        """States [T, H] -> fp32 logits [T, last - first] of a slice of the vocabulary, a tensor of its own."""
        import torch  # noqa: PLC0415

        if self.weight is None:
            return states[:, first:last].to(torch.float32, copy=True)
        bias = None if self.bias is None else self.bias[first:last].float()
        logits = torch.nn.functional.linear(states.float(), self.weight[first:last].float(), bias)
        logits = logits if self.scale == 1 else logits.mul_(self.scale)
        return logits.div_(self.cap).tanh_().mul_(self.cap) if self.cap else logits

    def vocabulary(self, states: Any) -> int:
        """How many logits a state makes."""
        return int(states.shape[1] if self.weight is None else self.weight.shape[0])


WHOLE = LmHead(weight=None, bias=None, scale=1.0, cap=0.0)


def find_lm_head(model: Any, ids: Sequence[int]) -> LmHead:
    """Find how a model gets its logits and try it on some tokens; WHOLE where nothing known gives the model's own."""
    import torch  # noqa: PLC0415

    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return WHOLE
    scale, cap = _declared(model.config.get_text_config())
    tokens = torch.tensor([list(ids[:_PROBE_TOKENS])], device=model.get_input_embeddings().weight.device)
    wanted = model(tokens, use_cache=False).logits[0].float()
    states = model.base_model(tokens, use_cache=False).last_hidden_state[0]
    found = LmHead(head.weight.detach(), None if head.bias is None else head.bias.detach(), scale, cap)
    if wanted.shape[-1] != head.weight.shape[0] or states.shape[-1] != head.weight.shape[1]:
        return WHOLE
    error = (found.logits(states.to(wanted.device), 0, wanted.shape[-1]) - wanted).abs().max()
    allowed = _TOLERANCE.get(states.element_size(), 0.0) * float(wanted.abs().max())
    return found if float(error) <= allowed else WHOLE


def last_hidden_states(model: Any, lm_head: LmHead, samples: Sequence[Sequence[int]]) -> Iterator[Any]:
    """Yield the states [T, H] of each sample's tokens but the last; logits [T, V] where the head is WHOLE.

    Short samples share a forward pass. They are padded at their ends, where causal attention never looks.
    """
    import torch  # noqa: PLC0415

    device = model.get_input_embeddings().weight.device
    for batch in batches(samples, PASS_TOKENS if lm_head.weight is not None else _LOGITS_PASS_TOKENS):
        width = max(map(len, batch)) - 1
        rows = [[*ids[:-1], *[0] * (width + 1 - len(ids))] for ids in batch]
        tokens = torch.tensor(rows, device=device)
        if lm_head.weight is None:
            states = model(tokens, use_cache=False).logits
        else:
            states = model.base_model(tokens, use_cache=False).last_hidden_state
        for row, ids in zip(states, batch, strict=True):
            yield row[: len(ids) - 1]


def batches(samples: Sequence[Sequence[int]], most_tokens: int) -> list[list[Sequence[int]]]:
    """Put samples that follow each other into one batch, as long as it has no more tokens than that, padded."""
    groups: list[list[Sequence[int]]] = []
    for ids in samples:
        width = max([len(ids), *map(len, groups[-1])]) if groups else 0
        if groups and width * (len(groups[-1]) + 1) <= most_tokens:
            groups[-1].append(ids)
        else:
            groups.append([ids])
    return groups


def describe_lm_head(lm_head: LmHead, base: Path) -> dict[str, Any] | None:
    """Say where a base's files hold a readout, for `load_lm_head`; None where they don't hold it as it is."""
    parts = {"weight": lm_head.weight, "bias": lm_head.bias}
    names = {part: _name_of(tensor, base) for part, tensor in parts.items() if tensor is not None}
    if "weight" not in names or None in names.values():
        return None
    return {**names, "scale": lm_head.scale, "cap": lm_head.cap}


def load_lm_head(description: Mapping[str, Any], base: Path, model: Any) -> LmHead:
    """Read a described readout from the base's files, in a model's precision and beside its own."""
    device = model.get_output_embeddings().weight.device
    weight = _named(base, description["weight"]).to(device, model.dtype)
    bias = _named(base, description["bias"]).to(device, model.dtype) if "bias" in description else None
    return LmHead(weight, bias, description["scale"], description["cap"])


def _declared(config: Any) -> tuple[float, float]:
    """What the known families do to their logits: Cohere scales, Granite divides, Gemma caps."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return scale, float(getattr(config, "final_logit_softcapping", None) or 0.0)


def _name_of(tensor: Any, base: Path) -> str | None:
    import torch  # noqa: PLC0415

    for name, shape, load in _stored(base):
        if shape == list(tensor.shape) and torch.equal(load().to(tensor.device, tensor.dtype), tensor):
            return name
    return None


def _named(base: Path, wanted: str) -> Any:
    return next(load() for name, _, load in _stored(base) if name == wanted)


def _stored(base: Path) -> Iterator[tuple[str, list[int], Callable[[], Any]]]:
    """Walk over a base's tensors without reading them: name, shape, and how to load one."""
    from safetensors import safe_open  # noqa: PLC0415

    for file in weight_files(base):
        with safe_open(file, framework="pt") as stream:
            for name in sorted(stream.keys()):
                yield name, stream.get_slice(name).get_shape(), partial(stream.get_tensor, name)
