"""What earlier layers' rounding did to a block's residual stream, at the linear layers that write into it.

A block of a decoder adds the outputs of two linear layers to its residual stream, `o_proj` and `down_proj`. Each of
them can make up for a part of what the stream has lost so far: the difference between the stream of the unquantized
model and that of the model whose earlier layers are quantized, before its own output is added. GPTQModel runs a block
first unquantized, through its `NativeProcessor`, then for the solver; both passes see the samples in the same order.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from quantize.errors import SolveError
from quantize.schemes.module_config import narrows

# Tails of the layers that write into the stream: the first reads a block's input, the second what attention gave.
_WRITERS = (".self_attn.o_proj", ".mlp.down_proj")


class ResidualStreams:
    """The streams in front of all writers: those of the unquantized model wait for the solver's pass over the block."""

    def __init__(self, device: str | None = None) -> None:
        self._device = device
        self._present: dict[str, Any] = {}
        self._unquantized: dict[str, deque[Any]] = {}

    def watch(self, model: Any, modules: Iterable[str], mlp_norm: str) -> None:
        """Note the stream whenever it passes in front of a writer."""
        for name in modules:
            for number, tail in enumerate(_WRITERS):
                if name.endswith(tail):
                    block = name.removesuffix(tail)
                    reader = model.get_submodule(f"{block}.{mlp_norm}" if number else block)
                    reader.register_forward_pre_hook(self._noting(name), with_kwargs=True)
                    self._unquantized[name] = deque()

    def _noting(self, writer: str) -> Any:
        def note(_module: Any, inputs: Sequence[Any], keywords: dict[str, Any]) -> None:
            self._present[writer] = (inputs[0] if inputs else keywords["hidden_states"]).detach()

        return note

    def keep(self, writer: str) -> None:
        """Keep the present stream as that of the unquantized model; other modules than writers have none."""
        if writer in self._unquantized:
            present = self._present[writer]
            self._unquantized[writer].append(present.to(self._device) if self._device else present)

    def lost(self, writer: str, output: Any) -> Any | None:
        """Give what must be added to the output [..., N] of the next sample to make up for what the stream has lost.

        Gives [T, N]; None for modules that are no writers. SolveError if the stream has another number of tokens.
        """
        if writer not in self._unquantized:
            return None
        output = output.reshape(-1, output.shape[-1]).float()
        present = self._present[writer].reshape(-1, output.shape[-1]).float()
        wanted = self._unquantized[writer].popleft().to(present.device).reshape(-1, output.shape[-1]).float()
        if not wanted.shape == present.shape == output.shape:
            raise SolveError(
                f"{writer}: the residual stream is {list(wanted.shape)} and {list(present.shape)}, its output "
                f"{list(output.shape)}; this version of GPTQModel runs blocks otherwise: pass --residual 0"
            )
        return wanted - present

    def forget(self, writer: str) -> None:
        """Drop what is kept for a writer, of a layer that was solved before."""
        if writer in self._unquantized:
            self._unquantized[writer].clear()


def keeps_outputs(module: Any) -> bool:
    """Whether GPTAQ keeps the unquantized model's outputs of a module (GPTQModel's `NamedModule`), not its inputs."""
    return narrows(module.full_name, *module.module.weight.shape)


def keeping(native: type, streams: ResidualStreams) -> type:
    """Derive from GPTQModel's `NativeProcessor` one that keeps the streams of the unquantized model, too.

    Where `keeps_outputs` says so, it keeps a module's outputs in place of its inputs.
    """
    places: dict[str, tuple[str, bool]] = {}  # full names of the block at work, and whether outputs are kept

    class Keeping(native):  # type: ignore[misc]
        def preprocess(self, module: Any) -> None:
            super().preprocess(module)
            places[module.name] = module.full_name, keeps_outputs(module)
            streams.forget(module.full_name)

        def pre_process_fwd_hook(self, name: str) -> Any:
            hook, (full_name, by_output) = super().pre_process_fwd_hook(name), places[name]

            def kept(module: Any, inputs: Any, output: Any) -> None:
                streams.keep(full_name)
                hook(module, (output,) if by_output else inputs, output)

            return kept

    return Keeping
