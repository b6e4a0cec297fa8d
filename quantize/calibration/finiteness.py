"""NaN/Inf check of a base's logits on every sample. Runs as a child process, before any quantizing.

A single NaN or Inf makes a Hessian unusable: then Cholesky fails, or a module is silently rounded to nearest instead of
solved. The cause is a sample or a weight; the error names it.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantize.errors import CalibrationError, RecipeError
from quantize.running.worker import WorkerChannel, run_child

# Positions per forward pass, with a cache behind it: logits of a whole sample never exist at once.
_FORWARD_TOKENS = 512
_SAMPLES_NAMED = 10


@dataclass(frozen=True, slots=True)
class NonFiniteModule:
    """The first module with a NaN or Inf in its output, and the first token for which it has one.

    `finite_inputs`: whether its inputs were finite; `finite_weights`: whether its own weights are.
    """

    module: str
    token: int
    finite_inputs: bool
    finite_weights: bool

    def __str__(self) -> str:
        """Say where to look."""
        if not self.finite_weights:
            return f"{self.module}, whose own weights have NaN or Inf"
        return self.module if self.finite_inputs else f"what comes right before {self.module}"


def check_samples(job: dict[str, Any], channel: WorkerChannel) -> dict[str, Any]:
    """Child's work: `{base, samples: [{ids, where}]}` -> `{}`; an error says which sample and which module."""
    import torch  # noqa: PLC0415

    from quantize.dense_models import load_base  # noqa: PLC0415

    base, samples = Path(job["base"]), job["samples"]
    model = load_base(base)
    total, done, non_finite = sum(len(sample["ids"]) for sample in samples), 0, []
    with torch.inference_mode():
        for sample in samples:
            # A sum is finite only if every term is; it needs no memory, unlike a mask of the same shape.
            sums = [logits.sum(dtype=torch.float32) for _, logits in _logits(model, sample["ids"])]
            if not all(map(_is_finite, sums)):
                non_finite.append(sample)
            done += len(sample["ids"])
            channel.progress(done, total)
        if non_finite:
            modules = [find_non_finite_module(model, sample["ids"]) for sample in non_finite[:_SAMPLES_NAMED]]
            raise explained(base, non_finite, modules, every=len(non_finite) == len(samples))
    return {}


def find_non_finite_module(model: Any, ids: Sequence[int]) -> NonFiniteModule | None:
    """Let a model read token ids again and find the first module with a NaN or Inf in its output, or None."""
    with _watched(model) as found:
        for start, _ in _logits(model, ids):
            if found:
                return replace(found[0], token=start + found[0].token)
    return None


def explained(
    base: Path, non_finite: Sequence[dict[str, Any]], modules: Sequence[NonFiniteModule | None], *, every: bool
) -> CalibrationError | RecipeError:
    """Blame the base where every sample fails in non-finite weights, and the samples otherwise."""
    if every and all(found and not found.finite_weights for found in modules):
        return RecipeError(
            f"{base}: its logits are NaN or Inf in every sample, first in {modules[0]}; copy the model again, "
            "or train it anew"
        )
    return CalibrationError([_told(sample, found) for sample, found in zip(non_finite, modules, strict=False)])


def _told(sample: dict[str, Any], found: NonFiniteModule | None) -> str:
    place = f", first in {found}, at token {found.token} (id {sample['ids'][found.token]})" if found else ""
    return f"{sample['where']}: the base's logits are NaN or Inf{place}; remove this row, or repair the base"


def _logits(model: Any, ids: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Yield (first position, logits [T, V]) over token ids."""
    import torch  # noqa: PLC0415

    tokens, cache = torch.tensor(ids, device=model.device), None
    for start in range(0, len(ids), _FORWARD_TOKENS):
        output = model(tokens[None, start : start + _FORWARD_TOKENS], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        yield start, output.logits[0]


@contextmanager
def _watched(model: Any) -> Iterator[list[NonFiniteModule]]:
    """Lend a list that gets the first module whose output has a NaN or Inf."""
    found: list[NonFiniteModule] = []

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if not found and not _is_finite(output):
                finite_weights = all(map(_is_finite, module.parameters()))
                found.append(NonFiniteModule(name, _first_token(output), _is_finite(inputs), finite_weights))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _first_token(output: Any) -> int:
    """Find the first token [batch, T, ...] with a NaN or Inf in a module's output; 0 where it has no such shape."""
    tensor = next(iter(output)) if isinstance(output, tuple | list) else output
    if tensor.dim() < 3:
        return 0
    non_finite = tensor[0].isfinite().flatten(1).all(-1).logical_not()
    return int(non_finite.int().argmax())


def _is_finite(value: Any) -> bool:
    """Whether every tensor in a module's inputs or outputs is finite."""
    import torch  # noqa: PLC0415

    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    return all(map(_is_finite, value)) if isinstance(value, tuple | list) else True


if __name__ == "__main__":
    sys.exit(run_child(check_samples))
