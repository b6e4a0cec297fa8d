"""What a model loses with solved integers in its layers, seen at the logits. Runs as a child process.

First single units are measured: the parent, with the integers of a solution in one unit alone. A KL is quadratic in
small errors, and errors of different units point in different directions, so the sum over all units is near the KL of
the whole solution (SmolLM2-135M: 0.224 and 0.219 nats). Measured among the errors of all other units, a unit's share
would be the difference of two large figures, and mostly noise. Then assignments of whole models are measured.
"""

import inspect
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.backends.layer_checkpoint import dense_weight
from quantize.dense_models import load_base
from quantize.errors import RecipeError
from quantize.running.worker import WorkerChannel, run_child

_SOFTMAX_TOKENS = 128
# A shortened model must give the whole one's logits to this share of the largest one, or it isn't used.
_CLOSE = 1e-4


@dataclass(frozen=True, slots=True)
class Text:
    """A chat's ids [T]; what the model says from position `first` on is compared. `parent` [T - first, V] said so."""

    ids: Sequence[int]
    first: int
    parent: Any


@dataclass(slots=True)
class Assembled:
    """A model whose linear layers have the integers of solutions; `present` says of which, by module."""

    layers: Mapping[str, Any]
    folders: Sequence[Path]
    present: dict[str, int] = field(default_factory=dict)

    def put(self, numbers: Mapping[str, int]) -> None:
        """Give modules the weights of the solutions with these numbers, as a variant will have them."""
        for module, number in numbers.items():
            if self.present.get(module) != number:
                weight = self.layers[module].weight
                weight.data.copy_(solved_weight(self.folders[number] / f"{module}.safetensors"))
                self.present[module] = number

    @contextmanager
    def alone(self, modules: Sequence[str]) -> Iterator[None]:
        """Give modules of the parent the weights of the first solution for a while; its own wait in main memory."""
        parents = [self.layers[module].weight.data.to("cpu", copy=True) for module in modules]
        self.put(dict.fromkeys(modules, 0))
        try:
            yield
        finally:
            for module, weight in zip(modules, parents, strict=True):
                self.layers[module].weight.data.copy_(weight)
                del self.present[module]


def measure(job: dict[str, Any], channel: WorkerChannel) -> dict[str, Any]:
    """Child's work: `{base, solved, whole, short, assignments, units}` -> `{kl, units}`.

    `solved` are folders of solutions, `whole` and `short` texts of `{ids, first}`. `assignments` tell every module's
    solution by number: `kl` are their divergences on `whole`. `units` tell the modules of each unit by its name: the
    result has by name the divergence on `short` of the parent with the first solution's integers in this unit alone.
    """
    import torch  # noqa: PLC0415

    base = Path(job["base"])
    model = load_base(base)
    total = len(job["units"]) + len(job["assignments"])
    with torch.inference_mode():
        assembled = Assembled(linear_layers(model, [*job["assignments"][0]], base), [*map(Path, job["solved"])])
        whole, short = (read_parent(model, job[name]) for name in ("whole", "short"))
        hidden = read_hidden(model, short) if job["units"] else ()
        units = {}
        for number, (name, modules) in enumerate(job["units"].items(), 1):
            with assembled.alone(modules):
                units[name] = _finite(divergence(model, short, hidden, layer_of(model, modules[0])), base)
            channel.progress(number, total)
        kls = []
        for number, assignment in enumerate(job["assignments"], len(units) + 1):
            assembled.put(assignment)
            kls.append(_finite(divergence(model, whole), base))
            channel.progress(number, total)
    return {"kl": kls, "units": units}


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


def solved_weight(path: Path) -> Any:
    """Read the dense weight [N, K] of a solved module, with scales in fp16, as a GPTQ file has them."""
    import torch  # noqa: PLC0415
    from safetensors import safe_open  # noqa: PLC0415

    with safe_open(path, framework="pt") as file:
        integers, scale, zero, g_idx = map(file.get_tensor, ("integers", "scale", "zero", "g_idx"))
    return dense_weight(integers, scale.to(torch.float16).float(), zero.float().round(), g_idx)


def read_parent(model: Any, texts: Sequence[Mapping[str, Any]]) -> list[Text]:
    """Let the parent read texts of `{ids, first}`, and keep its log-probabilities."""
    return [
        Text(text["ids"], text["first"], _logits(model, text["ids"], text["first"]).log_softmax(-1)) for text in texts
    ]


def read_hidden(model: Any, texts: Sequence[Text]) -> tuple[tuple[Any, ...], ...]:
    """Keep what each layer reads, [1, T, H] by text and layer; nothing where a shortened model answers otherwise."""
    hidden = []
    for text in texts:
        with _watched_inputs(layers_of(model)) as seen:
            _logits(model, text.ids, text.first)
        hidden.append(tuple(seen))
    middle, first = len(layers_of(model)) // 2, texts[0]
    whole = _logits(model, first.ids, first.first).log_softmax(-1)
    short = _shortened_logits(model, middle, hidden[0][middle], first.first).log_softmax(-1)
    return tuple(hidden) if float((short - whole).abs().max() / whole.abs().max()) < _CLOSE else ()


def divergence(model: Any, texts: Sequence[Text], hidden: Sequence[Sequence[Any]] = (), layer: int = 0) -> float:
    """Mean KL in nats between the parent's answers and the model's, whose layers before `layer` give `hidden`."""
    total, tokens = 0.0, 0
    for number, text in enumerate(texts):
        if hidden:
            logits = _shortened_logits(model, layer, hidden[number][layer], text.first)
        else:
            logits = _logits(model, text.ids, text.first)
        for first in range(0, len(logits), _SOFTMAX_TOKENS):
            theirs = text.parent[first : first + _SOFTMAX_TOKENS]
            ours = logits[first : first + _SOFTMAX_TOKENS].log_softmax(-1)
            total += float((theirs.exp() * (theirs - ours)).sum())
        tokens += len(logits)
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


def _finite(kl: float, base: Path) -> float:
    if not math.isfinite(kl):
        raise RecipeError(f"{base}: once it is quantized, its logits are no numbers; mend it or copy it again")
    return kl


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


def _logits(model: Any, ids: Sequence[int], first: int) -> Any:
    import torch  # noqa: PLC0415

    given = torch.tensor([list(ids)], device=model.device)
    return _scored(model, given.shape[1] - first, input_ids=given)


def _shortened_logits(model: Any, layer: int, hidden: Any, first: int) -> Any:
    """Run the model from `layer` on, by giving it that layer's input as its embeddings."""
    import torch  # noqa: PLC0415

    decoder = model.get_decoder()
    whole = decoder.layers
    decoder.layers = torch.nn.ModuleList(list(whole)[layer:])
    try:
        return _scored(model, hidden.shape[1] - first, inputs_embeds=hidden)
    finally:
        decoder.layers = whole


def _scored(model: Any, last: int, **given: Any) -> Any:
    """Give the logits [last, V] of the last positions; the output matrix is the widest there is."""
    few = {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(**given, **few, use_cache=False).logits[0, -last:].float()


if __name__ == "__main__":
    sys.exit(run_child(measure))
