"""FP8 by rounding: the numbers are those of compressed-tensors, layers are taken out of the tensors that hold them."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")

from quantize.backends.fp8_child import first_rows_of, quantize, rounded, spread, weight_of  # noqa: E402
from quantize.errors import SolveError  # noqa: E402
from quantize.modules import LinearLayer, ModuleTree  # noqa: E402
from quantize.schemes.scheme import preset  # noqa: E402
from quantize.variants.weights import fp8_dense, packed_module  # noqa: E402


class Channel:
    """Counts progress."""

    def __init__(self) -> None:
        self.done: list[tuple[int, int]] = []

    def progress(self, done: int, total: int) -> None:
        """Note it."""
        self.done.append((done, total))


@pytest.mark.parametrize("block", [None, (128, 128)])
def test_the_numbers_are_those_of_compressed_tensors(block: tuple[int, int] | None) -> None:
    """Scales and integers as the library that vLLM uses computes them."""
    args = pytest.importorskip("compressed_tensors.quantization.quant_args")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    quantized, scale = rounded(weight, block)
    theirs = args.QuantizationArgs(
        num_bits=8, type="float", strategy="block" if block else "channel", block_structure=block
    )
    zero = torch.zeros_like(scale).to(torch.float8_e4m3fn)
    expected = forward.quantize(weight, scale, zero, theirs, dtype=torch.float8_e4m3fn)
    assert torch.equal(quantized.float(), expected.float())
    size = block or (1, 384)
    largest = float((quantized.float().abs() * spread(scale, size, weight.shape)).amax())
    assert largest == pytest.approx(float(weight.abs().amax()), rel=1e-6)
    part = "weight_scale_inv" if block else "weight_scale"
    dense = fp8_dense({"weight": quantized, part: scale})
    assert (dense - weight).abs().amax() <= weight.abs().amax() / 16


def test_matrices_that_no_block_divides() -> None:
    """The last block is smaller; a row of zeros stays zero."""
    weight = torch.randn(200, 130)
    weight[3] = 0
    quantized, scale = rounded(weight, (128, 128))
    assert tuple(scale.shape) == (2, 2)
    dense = fp8_dense({"weight": quantized, "weight_scale_inv": scale})
    assert torch.allclose(dense, weight, atol=float(weight.abs().amax()) / 16)
    rows, row_scale = rounded(weight, None)
    assert torch.equal(rows[3].float(), torch.zeros(130))
    assert row_scale[3] == 1


def layers() -> tuple[LinearLayer, ...]:
    """Two parts of a matrix, of different height, and an expert in a tensor of all."""
    return (
        LinearLayer("l.0.up", "l.0.gate_up", "l.0.gate_up.weight", 3, 4, part=1),
        LinearLayer("l.0.gate", "l.0.gate_up", "l.0.gate_up.weight", 2, 4, part=0),
        LinearLayer("l.0.experts.1.down", "l.0.experts.1.down", "l.0.experts.down", 4, 2, expert=1),
    )


def test_layers_are_taken_out_of_their_tensors() -> None:
    """By rows, by expert, and turned where the base stores inputs first."""
    tree = ModuleTree(layers())
    up, gate, down = layers()
    first = first_rows_of(tree)
    matrix = torch.arange(20.0).reshape(5, 4)
    assert torch.equal(weight_of(gate, matrix, first["l.0.gate"]), matrix[:2])
    assert torch.equal(weight_of(up, matrix, first["l.0.up"]), matrix[2:])
    experts = torch.randn(2, 4, 2)
    assert torch.equal(weight_of(down, experts, 0), experts[1])
    assert torch.equal(weight_of(down, experts.transpose(1, 2), 0), experts[1])
    with pytest.raises(SolveError, match="has shape"):
        weight_of(gate, matrix[:, :3], 0)


def test_a_stopped_run_keeps_its_modules(tmp_path: Path) -> None:
    """What is there is not computed again; parts are joined as the base has them."""
    save = pytest.importorskip("safetensors.torch").save_file
    base, into = tmp_path / "base", tmp_path / "into"
    base.mkdir()
    into.mkdir()
    matrix = torch.randn(5, 4)
    save({"l.0.gate_up.weight": matrix}, base / "model.safetensors")
    job: dict[str, Any] = {
        "base": str(base),
        "tree": ModuleTree(layers()[:2]).as_json(),
        "modules": ["l.0.gate_up"],
        "block": None,
        "into": str(into),
    }
    channel: Any = Channel()
    first = quantize(job, channel)
    assert channel.done == [(1, 2), (2, 2)]
    stamp = (into / "l.0.up.safetensors").stat().st_mtime_ns
    assert quantize(job, channel)["modules"] == first["modules"]
    assert (into / "l.0.up.safetensors").stat().st_mtime_ns == stamp
    assert all(0 < row["loss"] < 1e-2 for row in first["modules"])
    from quantize.backends.packing import rounded_tensors  # noqa: PLC0415

    tensors = rounded_tensors(into, ["l.0.gate", "l.0.up"], lambda _: None)
    joined = packed_module(tensors, ["l.0.gate", "l.0.up"], "l.0.gate_up", preset("fp8-dynamic"))
    whole, scale = rounded(matrix, None)
    assert torch.equal(joined["l.0.gate_up.weight"].view(torch.uint8), whole.view(torch.uint8))
    assert torch.equal(joined["l.0.gate_up.weight_scale"], scale)


def test_nan_is_an_error(tmp_path: Path) -> None:
    """It is found where it is."""
    save = pytest.importorskip("safetensors.torch").save_file
    save({"a.weight": torch.full((2, 4), float("nan"))}, tmp_path / "model.safetensors")
    job = {
        "base": str(tmp_path),
        "tree": ModuleTree((LinearLayer("a", "a", "a.weight", 2, 4),)).as_json(),
        "modules": ["a"],
        "block": None,
        "into": str(tmp_path),
    }
    channel: Any = Channel()
    with pytest.raises(SolveError, match=r"a\.weight: has NaN or Inf"):
        quantize(job, channel)
