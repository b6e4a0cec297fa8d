"""What a residual stream has lost, at the layers that write into it; and weights that give a part of it back."""

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")

from quantize.backends.gptaq import Correction, corrected, second_moments  # noqa: E402
from quantize.backends.regularization import Regularization  # noqa: E402
from quantize.backends.residual_stream import ResidualStreams, keeping  # noqa: E402
from quantize.errors import SolveError  # noqa: E402

pytestmark = pytest.mark.real_model

ALMOST_NOTHING = Regularization(0.0, (1e-4,))
OUT, DOWN = "layers.0.self_attn.o_proj", "layers.0.mlp.down_proj"


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """As in the solver."""
    with torch.no_grad():
        yield


class Block(torch.nn.Module):  # type: ignore[misc, name-defined]
    """h + o(h), then + down(norm(h)): a block without what is of no matter here."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.norm = torch.nn.Module(), torch.nn.Module(), torch.nn.Identity()
        self.self_attn.o_proj = torch.nn.Linear(4, 4, bias=False)
        self.mlp.down_proj = torch.nn.Linear(4, 4, bias=False)

    def forward(self, hidden_states: Any) -> Any:
        """One sample [1, T, 4]."""
        middle = hidden_states + self.self_attn.o_proj(hidden_states)
        return middle + self.mlp.down_proj(self.norm(middle))


class Passes:
    """GPTQModel's NativeProcessor, as far as it is derived from."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.kept: list[Any] = []

    def preprocess(self, module: Any) -> None:
        """Called once for each module, before its block runs."""

    def pre_process_fwd_hook(self, name: str) -> Any:
        """Give the hook of a module, which keeps what it is given as its input."""

        def keep(_module: Any, inputs: Any, _output: Any) -> None:
            self.seen.append(name)
            self.kept.append(inputs[0])

        return keep


def streams_of(block: Block, samples: list[Any]) -> tuple[ResidualStreams, Any]:
    """Run the samples through the unquantized block, as GPTQModel does; gives the streams, and the model."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([block])
    streams = ResidualStreams()
    streams.watch(model, [OUT, DOWN, "layers.0.self_attn.q_proj"], "norm")
    passes = keeping(Passes, streams)()
    handles = []
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        module = block.get_submodule(name)
        passes.preprocess(SimpleNamespace(name=name, full_name=f"layers.0.{name}", module=module))
        handles.append(module.register_forward_hook(passes.pre_process_fwd_hook(name)))
    for sample in samples:
        block(sample)
    for handle in handles:
        handle.remove()
    assert passes.seen == ["self_attn.o_proj", "mlp.down_proj"] * len(samples)
    return streams, model


def test_each_writer_is_told_what_the_stream_before_it_has_lost() -> None:
    """The block's input for o, what has the output of attention in it for down; sample by sample."""
    torch.manual_seed(0)
    samples, block = [torch.randn(1, tokens, 4) for tokens in (3, 5)], Block()
    streams, model = streams_of(block, samples)
    drifted = [sample + 0.1 * torch.randn_like(sample) for sample in samples]
    for sample, present in zip(samples, drifted, strict=True):
        model.layers[0](hidden_states=present)
        assert torch.allclose(streams.lost(OUT, present), (sample - present)[0], atol=1e-6)
        lost = (sample - present) + block.self_attn.o_proj(sample - present)
        assert torch.allclose(streams.lost(DOWN, present), lost[0], atol=1e-5)
        assert streams.lost("layers.0.self_attn.q_proj", present) is None


def test_streams_of_other_samples_are_refused() -> None:
    """Nothing is solved on a difference of unlike things."""
    streams, model = streams_of(Block(), [torch.randn(1, 3, 4)])
    model.layers[0](torch.randn(1, 5, 4))
    with pytest.raises(SolveError, match=r"\[3, 4\] and \[5, 4\], its output \[5, 4\].*--residual 0"):
        streams.lost(OUT, torch.randn(1, 5, 4))


class Gatherer:
    """GPTQModel's GPTAQ, as far as it is derived from; `kept` is of one sample of the unquantized model."""

    def __init__(self, module: Any, name: str, kept: Any) -> None:
        self.module, self._named_module = module, SimpleNamespace(full_name=name, module=module)
        self.native_inps = [kept]
        self.nsamples, self.fwd_counter, self.H = 0, 0, None


SOLVER = SimpleNamespace(quantize=lambda _self, blocksize: None, free=lambda _self: None)


def test_weights_give_back_what_the_stream_has_lost() -> None:
    """With both shares whole, o's output is nearly what it was, and what the stream lacks is in it."""
    torch.manual_seed(0)
    sample, block = torch.randn(1, 400, 4), Block()
    streams, model = streams_of(block, [sample])
    present = sample + 0.3 * sample @ torch.randn(4, 4)
    weights = block.self_attn.o_proj.weight.clone()
    made = corrected(SOLVER, Gatherer, Correction(1.0, 1.0), streams, lambda _columns: ALMOST_NOTHING)
    solving = made(block.self_attn.o_proj, OUT, sample @ weights.T)
    wanted = sample + sample @ weights.T
    before = (present + present @ weights.T - wanted).square().mean()
    model.layers[0](present)
    solving.add_batch(present, block.self_attn.o_proj(present))
    solving.quantize()
    after = (present + block.self_attn.o_proj(present) - wanted).square().mean()
    assert after < 0.01 * before


def test_layers_with_one_input_sum_it_once() -> None:
    """q, k and v: each has a Hessian of its own to solve with, and the moments go when the last one is solved."""
    torch.manual_seed(0)
    present, unquantized = torch.randn(1, 40, 4), torch.randn(1, 40, 4)
    made = corrected(SOLVER, Gatherer, Correction(0.5, 0.0), ResidualStreams(), lambda _columns: ALMOST_NOTHING)
    layers = [torch.nn.Linear(4, 3, bias=False) for _ in "qkv"]
    solving = [
        made(layer, f"layers.0.self_attn.{part}_proj", unquantized) for part, layer in zip("qkv", layers, strict=True)
    ]
    before = [layer.weight.clone() for layer in layers]
    for one in solving:
        one.add_batch(present, None)
    sums = weakref.ref(solving[0]._moments)
    for one in solving:
        one.quantize()
        assert torch.allclose(one.H, 2 * present[0].T @ present[0], atol=1e-4)
    assert len({one.H.data_ptr() for one in solving}) == 3
    assert sums() is None
    inverse = torch.linalg.inv(present[0].T @ present[0])
    for layer, weight in zip(layers, before, strict=True):
        drift = (unquantized - present)[0].T @ present[0]
        assert torch.allclose(layer.weight, weight + 0.5 * weight @ drift @ inverse, atol=1e-2)


def test_a_narrow_layer_keeps_outputs() -> None:
    """down: the unquantized model's outputs move its weights as its inputs would, through GPTQModel's own hook."""
    torch.manual_seed(0)
    present, unquantized = torch.randn(1, 40, 4), torch.randn(1, 40, 4)
    layer = torch.nn.Linear(4, 3, bias=True)
    passes = keeping(Passes, ResidualStreams())()
    passes.preprocess(SimpleNamespace(name="mlp.down_proj", full_name=DOWN, module=layer))
    handle = layer.register_forward_hook(passes.pre_process_fwd_hook("mlp.down_proj"))
    output = layer(unquantized)
    handle.remove()
    (kept,) = passes.kept
    assert torch.equal(kept, output)
    made = corrected(SOLVER, Gatherer, Correction(0.5, 0.0), ResidualStreams(), lambda _columns: ALMOST_NOTHING)
    solving, weight = made(layer, DOWN, kept), layer.weight.clone()
    solving.add_batch(present, layer(present))
    solving.quantize()
    drift, hessian = (unquantized - present)[0].T @ present[0], present[0].T @ present[0]
    assert torch.allclose(layer.weight, weight + 0.5 * weight @ drift @ torch.linalg.inv(hessian), atol=1e-2)


@pytest.mark.parametrize("columns", [1, 3, 4, 5, 130])
def test_second_moments(columns: int) -> None:
    """Strips give what the whole product does, also where columns are no multiple of them."""
    inputs = torch.randn(7, columns, dtype=torch.float64)
    assert torch.allclose(second_moments(inputs), inputs.T @ inputs)
