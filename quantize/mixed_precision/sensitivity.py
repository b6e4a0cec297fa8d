"""How much each unit of a model suffers from rounding: one unit at a time, seen at the logits. Runs as a child process.

A unit is rounded to nearest with searched scales, the rest of the model stays as it is, and the mean KL divergence at
the logits is what rounding costs there. It is measured with a unit's smallest numbers; the others are scaled by their
output error, for small errors add to the logits linearly and to the divergence quadratically.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.backends.scales import best_scales
from quantize.dense_models import load_base
from quantize.errors import RecipeError
from quantize.running.worker import WorkerChannel, run_child
from quantize.schemes.module_config import WeightArgs

_SOFTMAX_TOKENS = 128
# A shortened model must give the parent's logits to this share of the largest one, or it isn't used.
_CLOSE = 1e-4


@dataclass(frozen=True, slots=True)
class ReferenceOutputs:
    """What the parent said and saw: log-probabilities [T, V] and, by layer, the hidden states [1, T, H] it read."""

    answers: tuple[Any, ...]
    hidden: tuple[tuple[Any, ...], ...]


def measure(job: dict[str, Any], channel: WorkerChannel) -> dict[str, Any]:
    """Child's work: `{base, samples: [[token id]], units: {name: {modules, choices}}}` -> `{kl: {unit: [choice]}}`."""
    import torch  # noqa: PLC0415

    base, samples = Path(job["base"]), job["samples"]
    model = load_base(base)
    costs: dict[str, list[float]] = {}
    with torch.inference_mode():
        layers = linear_layers(
            model, [name for module_group in job["units"].values() for name in module_group["modules"]], base
        )
        moments = second_moments(model, samples, layers)
        reference_outputs = record_reference(model, samples)
        for done, (name, module_group) in enumerate(job["units"].items(), 1):
            modules = {module: layers[module] for module in module_group["modules"]}
            choices = [WeightArgs(*weight_args) for weight_args in module_group["choices"]]
            costs[name] = _module_group_costs(model, reference_outputs, moments, modules, choices, samples)
            if not all(map(math.isfinite, costs[name])):
                raise RecipeError(f"{base}: with {name} rounded, its logits are no numbers; mend it or copy it again")
            channel.progress(done, len(job["units"]))
    return {"kl": costs}


def linear_layers(model: Any, names: Sequence[str], base: Path) -> dict[str, Any]:
    """Find modules by name; RecipeError for one that the model has under no such name."""
    import torch  # noqa: PLC0415

    known = dict(model.named_modules())
    for name in names:
        if not isinstance(known.get(name), torch.nn.Linear):
            raise RecipeError(
                f"{base}: as transformers loads it, it has no linear layer {name}; scheme auto can't measure this "
                "architecture, name a scheme and overrides"
            )
    return {name: known[name] for name in names}


def _module_group_costs(
    model: Any,
    reference_outputs: ReferenceOutputs,
    moments: Mapping[str, Any],
    modules: Mapping[str, Any],
    choices: Sequence[WeightArgs],
    samples: Sequence[Sequence[int]],
) -> list[float]:
    smallest = {name: rounded(module.weight, moments[name], choices[0]) for name, module in modules.items()}
    energies = [sum(_energy(modules[name].weight, one, moments[name]) for name, one in smallest.items())]
    energies += [
        sum(
            _energy(module.weight, rounded(module.weight, moments[name], one), moments[name])
            for name, module in modules.items()
        )
        for one in choices[1:]
    ]
    with _replaced(modules, smallest):
        reference = divergence(model, reference_outputs, samples, layer_of(model, next(iter(modules))))
    return [reference * energy / energies[0] if energies[0] else 0.0 for energy in energies]


def rounded(weight: Any, moment: Any, weight_args: WeightArgs) -> Any:
    """Round a weight [N, K] to nearest in its groups; `moment` [K] is the mean square of each input."""
    import torch  # noqa: PLC0415

    size = weight.shape[1] if weight_args.group_size < 0 else weight_args.group_size
    half = 1 << (weight_args.bits - 1)
    parts = []
    for first in range(0, weight.shape[1], size):
        group = weight[:, first : first + size].float()
        scale = best_scales(group, moment[first : first + size], weight_args.bits).unsqueeze(1)
        parts.append((group / scale).round().clamp(-half, half - 1) * scale)
    return torch.cat(parts, dim=1).to(weight.dtype)


def _energy(weight: Any, changed: Any, moment: Any) -> float:
    return float(((changed - weight).float().square() * moment).sum())


@contextmanager
def _replaced(modules: Mapping[str, Any], weights: Mapping[str, Any]) -> Iterator[None]:
    before = {name: module.weight.data for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.weight.data = weights[name]
        yield
    finally:
        for name, module in modules.items():
            module.weight.data = before[name]


def second_moments(model: Any, samples: Sequence[Sequence[int]], modules: Mapping[str, Any]) -> dict[str, Any]:
    """Let the model read the samples; give the mean square [K] of every input of its named modules."""
    sums: dict[str, Any] = {}
    tokens = sum(map(len, samples))

    def add(name: str, inputs: Any) -> None:
        squares = inputs[0].float().square().sum(dim=tuple(range(inputs[0].ndim - 1)))
        sums[name] = sums[name] + squares if name in sums else squares

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs))
        for name, module in modules.items()
    ]
    for ids in samples:
        _logits(model, ids)
    for hook in hooks:
        hook.remove()
    return {name: total / tokens for name, total in sums.items()}


def record_reference(model: Any, samples: Sequence[Sequence[int]]) -> ReferenceOutputs:
    """Keep the parent's answers, and what each of its layers read where a shortened model gives the same answers."""
    answers, hidden = [], []
    for ids in samples:
        with _watched_inputs(layers_of(model)) as seen:
            answers.append(_logits(model, ids).log_softmax(-1))
        hidden.append(tuple(seen))
    reference_outputs = ReferenceOutputs(tuple(answers), tuple(hidden))
    middle = len(layers_of(model)) // 2
    again = _shortened_logits(model, middle, reference_outputs.hidden[0][middle]).log_softmax(-1)
    gap = float((again - answers[0]).abs().max() / answers[0].abs().max())
    return reference_outputs if gap < _CLOSE else ReferenceOutputs(tuple(answers), ())


def divergence(model: Any, reference_outputs: ReferenceOutputs, samples: Sequence[Sequence[int]], layer: int) -> float:
    """Mean KL in nats between the parent's answers and the model's, which differs from `layer` on."""
    total, tokens = 0.0, 0
    for number, ids in enumerate(samples):
        hidden = reference_outputs.hidden[number][layer] if reference_outputs.hidden else None
        logits = _logits(model, ids) if hidden is None else _shortened_logits(model, layer, hidden)
        for first in range(0, len(ids), _SOFTMAX_TOKENS):
            theirs = reference_outputs.answers[number][first : first + _SOFTMAX_TOKENS]
            ours = logits[first : first + _SOFTMAX_TOKENS].log_softmax(-1)
            total += float((theirs.exp() * (theirs - ours)).sum())
        tokens += len(ids)
    # Rounding may leave it a hair below zero; what is no number stays none.
    return 0.0 if total < 0 else total / tokens


def layers_of(model: Any) -> Any:
    """Find a decoder's list of layers."""
    return model.get_decoder().layers


def layer_of(model: Any, module: str) -> int:
    """Tell which layer a module belongs to; 0 where none is known, so that everything is computed again."""
    wanted = model.get_submodule(module)
    for number, layer in enumerate(layers_of(model)):
        if any(part is wanted for part in layer.modules()):
            return number
    return 0


@contextmanager
def _watched_inputs(layers: Any) -> Iterator[list[Any]]:
    seen: list[Any] = []

    def see(_: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        seen.append(given[0] if given else named["hidden_states"])

    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _logits(model: Any, ids: Sequence[int]) -> Any:
    import torch  # noqa: PLC0415

    return model(torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0].float()


def _shortened_logits(model: Any, layer: int, hidden: Any) -> Any:
    """Run the model from `layer` on, by giving it that layer's input as its embeddings."""
    import torch  # noqa: PLC0415

    decoder = model.get_decoder()
    whole = decoder.layers
    decoder.layers = torch.nn.ModuleList(list(whole)[layer:])
    try:
        return model(inputs_embeds=hidden, use_cache=False).logits[0].float()
    finally:
        decoder.layers = whole


if __name__ == "__main__":
    sys.exit(run_child(measure))
