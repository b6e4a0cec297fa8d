"""What linear layers read of the calibration samples: sizes of each channel, and some tokens for a search."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from quantize.dense_models import layered_base
from quantize.transforms.smoothing import ChannelActivations

# Enough to tell candidates apart; a layer of a 32B model keeps 20 MB of them.
SEARCH_TOKENS = 256


class ChannelRecorder:
    """Collects the inputs of one layer, a sample at a time; `kept` tokens of each sample stay."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._largest: Any = None
        self._squares: Any = None
        self._count = 0
        self._tokens: list[Any] = []

    def add(self, _: Any, inputs: tuple[Any, ...]) -> None:
        """Take a layer's inputs [1, T, K]: a forward pre-hook."""
        import torch  # noqa: PLC0415

        rows = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        largest, squares = rows.abs().amax(0), rows.square().sum(0)
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        self._squares = squares if self._squares is None else self._squares + squares
        self._count += len(rows)
        positions = torch.linspace(0, len(rows) - 1, min(self._kept, len(rows))).long()
        self._tokens.append(rows[positions].cpu())

    def result(self) -> ChannelActivations:
        """Return what was collected, on the CPU."""
        import torch  # noqa: PLC0415

        return ChannelActivations(self._largest.cpu(), (self._squares / self._count).cpu(), torch.cat(self._tokens))


def read_activations(
    base: Path, samples: Sequence[Sequence[int]], layers: Sequence[str]
) -> dict[str, ChannelActivations]:
    """Let a model read the samples, one of its layers in memory at a time; what each named linear layer reads."""
    import torch  # noqa: PLC0415

    layered = layered_base(base)
    modules = dict(layered.model.named_modules())
    recorders = {name: ChannelRecorder(max(1, SEARCH_TOKENS // len(samples))) for name in layers}
    hooks = [modules[name].register_forward_pre_hook(partial(ChannelRecorder.add, recorders[name])) for name in layers]
    with layered.reading() as model:
        device = model.get_input_embeddings().weight.device
        for ids in samples:
            model.base_model(torch.tensor([list(ids)], device=device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: recorder.result() for name, recorder in recorders.items()}
