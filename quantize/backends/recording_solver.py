"""GPTQModel's solver for one module, watched: same mathematics, but it names what is wrong and remembers what it found.

The library takes a module's activations (`add_batch`), factors their Hessian (`hessian_inverse`) and chooses integers
(`quantize`). Left alone it turns a non-finite activation or a Hessian that doesn't factor into rounding to nearest, and
says so in a log.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from quantize.backends.layer_checkpoint import LayerCheckpoint, ModuleSolution
from quantize.backends.losses import LossMedians, SolvedModule, as_loss
from quantize.backends.regularization import Regularization, factor
from quantize.backends.scales import best_scales, best_scales_and_zeros
from quantize.errors import CalibrationError, QuantizeError, RecipeError, SolveError
from quantize.modules import is_expert
from quantize.running.worker import WorkerChannel

_SAMPLES_NAMED = 10
_CPU_BLOCK = 32


@dataclass(slots=True)
class SolverRecord:
    """What is known of a run's modules; `solved` grows, `peaks` holds the largest activation of each token.

    `expert_fallback` "fail" makes an expert with too few tokens an error. `tokens` counts those of the calibration
    text, `ids` are their numbers, sample by sample.
    """

    checkpoint: LayerCheckpoint
    channel: WorkerChannel
    where: Sequence[str]
    damping: Sequence[float]
    completed: frozenset[int]
    expert_fallback: str = "rtn"
    tokens: int = 0
    ids: Sequence[Sequence[int]] = ()
    shrinkage: float = 0.0
    solved: list[SolvedModule] = field(default_factory=list)
    medians: LossMedians = field(default_factory=LossMedians)
    peaks: dict[str, dict[int, Any]] = field(default_factory=dict)

    def regularization(self, columns: int, tokens: int | None = None) -> Regularization:
        """Give that of a module with so many inputs, that `tokens` reached; without a number, all did."""
        return Regularization(self.shrinkage * columns / max(1, tokens or self.tokens), tuple(self.damping))

    def look(self, module: str, activations: Any, sample: int) -> None:
        """Remember each token's largest activation [T] of a sample, without waiting for the device."""
        self.peaks.setdefault(module, {})[sample] = activations.detach().abs().amax(-1).flatten()

    def require_finite(self, module: str) -> None:
        """Raise CalibrationError with the samples, and their first tokens, that give a module a non-finite input."""
        peaks = self.peaks.pop(module, {})
        finite = {sample: peak.isfinite() for sample, peak in peaks.items()}
        unsound = {sample: flags for sample, flags in finite.items() if not bool(flags.all())}
        if unsound:
            lines = [self._non_finite_line(module, sample, flags) for sample, flags in sorted(unsound.items())]
            more = [f"and {len(lines) - _SAMPLES_NAMED} more samples"] if len(lines) > _SAMPLES_NAMED else []
            raise CalibrationError([*lines[:_SAMPLES_NAMED], *more])

    def _non_finite_line(self, module: str, sample: int, finite: Any) -> str:
        token = int(finite.logical_not().int().argmax())
        ids = self.ids[sample] if sample < len(self.ids) else ()
        numbered = f" (id {ids[token]})" if token < len(ids) else ""
        return (
            f"{self.where[sample]}: non-finite activations (NaN or Inf), first in the input of {module}, at token "
            f"{token}{numbered}; remove this line, or repair the base"
        )

    def record(self, solved: SolvedModule) -> None:
        """Note a module, and tell the reader how its loss compares."""
        self.solved.append(solved)
        self.channel.event(
            {
                "module": solved.module,
                "layer": solved.layer,
                "loss": solved.loss,
                "damp": solved.damp,
                "loss_ratio": self.medians.ratio(solved),
                "undersampled": solved.undersampled,
                "tokens": solved.tokens,
                "all_tokens": self.tokens,
            },
        )

    def require_experts(self) -> None:
        """Raise SolveError with the first expert that too few tokens reached, if that is an error."""
        for solved in self.solved if self.expert_fallback == "fail" else ():
            if solved.undersampled:
                raise SolveError(
                    f"{solved.module}: {solved.tokens} of {self.tokens} calibration tokens reached this expert, too "
                    "few for GPTQ; add samples, or round such experts to nearest with --expert-fallback rtn",
                )

    def complete(self, layer: int) -> None:
        """Note that all modules of a layer are solved."""
        if layer not in self.completed:
            self.checkpoint.complete(layer, [solved.module for solved in self.solved if solved.layer == layer])


def recording(solver: Any, record: SolverRecord, *, weighted_scales: bool) -> type:
    """Derive a class from GPTQModel's `GPTQ` or `GPTAQ` that keeps a record, and skips layers that are whole."""

    class RecordingSolver(solver):  # type: ignore[misc]
        @property
        def _place(self) -> tuple[str, int]:
            return self._named_module.full_name, self._named_module.layer_index

        def add_batch(self, inp: Any, out: Any, batch_index: int | None = None) -> None:
            module, layer = self._place
            if layer in record.completed:
                return
            record.look(module, inp, 0 if batch_index is None else batch_index)
            super().add_batch(inp, out, batch_index=batch_index)

        def hessian_inverse(self, H: Any) -> tuple[Any, float]:  # noqa: N803
            # Without a factor the library rounds to nearest; the record sees that in the loss.
            tokens = int(self.nsamples) if is_expert(self._place[0]) else None
            upper, damp = factor(H, record.regularization(H.shape[0], tokens)) or (None, 1.0)
            self._charge(upper)
            return upper, damp

        def _shared_factor_or_local(self, ordering: str, producer: Any) -> Any:
            found = super()._shared_factor_or_local(ordering, producer)
            self._charge(found[0])
            return found

        def _charge(self, upper: Any) -> None:
            if weighted_scales and upper is not None:
                charges = upper.diagonal().pow(-2)
                self.quantizer.find_params = ScaleSearch(
                    self.quantizer, charges, self.qcfg.bits, symmetric=self.qcfg.sym
                )

        def quantize(self, blocksize: int = 128) -> tuple[Any, ...]:
            with _sent_first(record.channel):
                module, layer = self._place
                if layer in record.completed:
                    solution, seconds = record.checkpoint.read(module), 0.0
                else:
                    record.require_finite(module)
                    _require_finite_weights(module, self.module.weight)
                    with _half_of_the_threads():
                        block = _block_columns(self.module.weight.device.type, blocksize)
                        dense, scale, zero, g_idx, seconds, loss, damp, tokens = super().quantize(blocksize=block)
                    solution = ModuleSolution(dense, scale, zero, g_idx, loss, damp, tokens)
                    record.checkpoint.write(module, solution)
                record.record(_solved(module, layer, self.qcfg, solution))
                return (
                    solution.dense.to(self.module.weight.device),
                    solution.scale,
                    solution.zero,
                    solution.g_idx,
                    seconds,
                    solution.loss,
                    solution.damp,
                    solution.tokens,
                )

    return RecordingSolver


class ScaleSearch:
    """Stands in for the library's search for scales: called once for each group, in the order of the inputs."""

    def __init__(self, quantizer: Any, charges: Any, bits: int, *, symmetric: bool = True) -> None:
        self._quantizer, self._charges, self._bits, self._next = quantizer, charges, bits, 0
        self._symmetric = symmetric

    def __call__(self, weights: Any, **_options: Any) -> None:
        """Set the quantizer's scale and zero point, both [N, 1], for a group of weights [N, G]."""
        import torch  # noqa: PLC0415

        first, self._next = self._next, self._next + weights.shape[1]
        charges = self._charges[first : self._next]
        if self._symmetric:
            scale = best_scales(weights.float(), charges, self._bits)
            zero = torch.full_like(scale, float(1 << (self._bits - 1)))
        else:
            scale, zero = best_scales_and_zeros(weights.float(), charges, self._bits)
        self._quantizer.scale, self._quantizer.zero = scale.unsqueeze(1), zero.unsqueeze(1)


def _block_columns(device: str, usual: int) -> int:
    """Choose the size of GPTQ's blocks: after so many inputs, their errors are carried on to all later ones.

    Inside a block each error is carried on alone, which on a CPU takes longer the wider the block is. For GPUs the
    library has a kernel for blocks of the usual size. All group sizes are multiples of 32.
    """
    return _CPU_BLOCK if device == "cpu" else usual


@contextmanager
def _half_of_the_threads() -> Iterator[None]:
    """Compute with half of the threads: the library solves two modules at once, each in a thread of its own.

    torch keeps this number for each thread, so the other one and the model's passes are not changed.
    """
    import torch  # noqa: PLC0415

    every = torch.get_num_threads()
    torch.set_num_threads(max(1, every // 2))
    try:
        yield
    finally:
        torch.set_num_threads(every)


@contextmanager
def _sent_first(channel: WorkerChannel) -> Iterator[None]:
    """Send an error before it is raised: GPTQModel ends the process when a worker of its thread pool fails."""
    try:
        yield
    except QuantizeError as error:
        channel.error(error)
        raise


def _require_finite_weights(module: str, weight: Any) -> None:
    if not bool(weight.isfinite().all()):
        raise RecipeError(f"{module}: has non-finite weights (NaN or Inf); repair the base, or copy it again")


def _solved(module: str, layer: int, settings: Any, solution: ModuleSolution) -> SolvedModule:
    loss = as_loss(solution.loss)
    return SolvedModule(
        module,
        layer,
        settings.bits,
        settings.group_size,
        loss,
        solution.damp,
        tokens=solution.tokens,
        undersampled=loss is None and is_expert(module) and str(solution.loss).startswith("fallback("),
    )
