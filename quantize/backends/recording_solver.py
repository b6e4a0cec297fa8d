"""GPTQModel's solver for one module, watched: same mathematics, but it names what is wrong and remembers what it found.

The library takes a module's activations (`add_batch`), factors their Hessian (`hessian_inverse`) and chooses integers
(`quantize`). Left alone it turns a non-finite activation or a Hessian that doesn't factor into rounding to nearest, and
says so in a log.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quantize.backends.layer_checkpoint import LayerCheckpoint, ModuleSolution
from quantize.backends.losses import SolvedModule, as_loss, loss_ratio
from quantize.backends.scales import best_scales
from quantize.errors import SolveError
from quantize.modules import is_expert
from quantize.running.worker import WorkerChannel


@dataclass(slots=True)
class SolverRecord:
    """What is known of a run's modules; `solved` grows, `peaks` holds each sample's largest activation.

    `expert_fallback` "fail" makes an expert with too few tokens an error. `tokens` are those of the calibration text.
    """

    checkpoint: LayerCheckpoint
    channel: WorkerChannel
    where: Sequence[str]
    damping: Sequence[float]
    completed: frozenset[int]
    expert_fallback: str = "rtn"
    tokens: int = 0
    solved: list[SolvedModule] = field(default_factory=list)
    peaks: dict[str, dict[int, Any]] = field(default_factory=dict)

    def look(self, module: str, activations: Any, sample: int) -> None:
        """Remember how large a sample's activations are, without waiting for the device."""
        self.peaks.setdefault(module, {})[sample] = activations.detach().abs().amax()

    def require_finite(self, module: str) -> None:
        """Raise SolveError with the first sample that brought a module something that is no number."""
        for sample, peak in self.peaks.pop(module, {}).items():
            if not bool(peak.isfinite()):
                raise SolveError(
                    f"{self.where[sample]}: gives {module} an input that is no finite number (largest: {float(peak)}); "
                    "remove the sample, or load the base in bf16 if it was trained so",
                )

    def record(self, solved: SolvedModule) -> None:
        """Note a module, and tell the reader how its loss compares; SolveError if an expert must not be rounded."""
        if solved.undersampled and self.expert_fallback == "fail":
            raise SolveError(
                f"{solved.module}: {solved.tokens} of {self.tokens} calibration tokens reached this expert, too few "
                "for GPTQ; add samples, or round such experts to nearest with --expert-fallback rtn",
            )
        self.solved.append(solved)
        self.channel.event(
            {
                "module": solved.module,
                "layer": solved.layer,
                "loss": solved.loss,
                "damp": solved.damp,
                "loss_ratio": loss_ratio(self.solved),
                "undersampled": solved.undersampled,
                "tokens": solved.tokens,
                "all_tokens": self.tokens,
            },
        )

    def complete(self, layer: int) -> None:
        """Note that all modules of a layer are solved."""
        if layer not in self.completed:
            self.checkpoint.complete(layer, [solved.module for solved in self.solved if solved.layer == layer])


def factor(hessian: Any, damping: Sequence[float]) -> tuple[Any, float] | None:
    """Factor the inverse of a Hessian [K, K] with the least damping that works; None where none does.

    Gives the upper Cholesky factor of the damped Hessian's inverse, as GPTQ uses it, and leaves `hessian` as it was.
    """
    import torch  # noqa: PLC0415

    diagonal = hessian.diagonal()
    plain = diagonal.clone()
    for damp in damping:
        diagonal.add_(damp * plain.mean())
        lower, failed = torch.linalg.cholesky_ex(hessian)
        diagonal.copy_(plain)
        if int(failed):
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed):
            return upper, damp
    return None


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
            upper, damp = factor(H, record.damping) or (None, 1.0)
            self._charge(upper)
            return upper, damp

        def _shared_factor_or_local(self, ordering: str, producer: Any) -> Any:
            found = super()._shared_factor_or_local(ordering, producer)
            self._charge(found[0])
            return found

        def _charge(self, upper: Any) -> None:
            if weighted_scales and upper is not None:
                self.quantizer.find_params = Search(self.quantizer, upper.diagonal().pow(-2), self.qcfg.bits)

        def quantize(self, blocksize: int = 128) -> tuple[Any, ...]:
            module, layer = self._place
            if layer in record.completed:
                solution, seconds = record.checkpoint.read(module), 0.0
            else:
                record.require_finite(module)
                dense, scale, zero, g_idx, seconds, loss, damp, tokens = super().quantize(blocksize=blocksize)
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


class Search:
    """Stands in for the library's search for scales: called once for each group, in the order of the inputs."""

    def __init__(self, quantizer: Any, charges: Any, bits: int) -> None:
        self._quantizer, self._charges, self._bits, self._next = quantizer, charges, bits, 0

    def __call__(self, weights: Any, **_options: Any) -> None:
        """Set the quantizer's scale and zero point, both [N, 1], for a group of weights [N, G]."""
        import torch  # noqa: PLC0415

        first, self._next = self._next, self._next + weights.shape[1]
        scale = best_scales(weights.float(), self._charges[first : self._next], self._bits)
        self._quantizer.scale = scale.unsqueeze(1)
        self._quantizer.zero = torch.full_like(self._quantizer.scale, float(1 << (self._bits - 1)))


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
