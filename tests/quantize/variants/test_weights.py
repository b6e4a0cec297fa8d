"""Packed words and dense tensors say the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.errors import VariantError
from quantize.schemes.scheme import preset
from quantize.variants.weights import gptq_dense, gptq_integers, gptq_to_int8, packed_module, read_dense, read_packing

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")

from quantize.variants.bit_packing import unpack_columns, unpack_rows  # noqa: E402
from quantize.variants.weights import int8_dense, pack_quantized_dense  # noqa: E402


def pack_rows(values: Any, bits: int) -> Any:
    """[K, N] values of `bits` bits -> [K*bits/32, N] int32 words; the inverse of `unpack_rows`."""
    per_word = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int64).view(1, -1, 1)
    grouped = values.to(torch.int64).view(-1, per_word, values.shape[1])
    return (grouped << shifts).sum(dim=1).to(torch.int32)


@st.composite
def grids(draw: st.DrawFn, bits: int) -> Any:
    """A small matrix of `bits`-bit values whose first side fills whole words."""
    rows, columns = draw(st.integers(1, 3)) * 32 // bits, draw(st.integers(1, 3)) * 32 // bits
    values = st.lists(st.integers(0, 2**bits - 1), min_size=rows * columns, max_size=rows * columns)
    return torch.tensor(draw(values), dtype=torch.int32).reshape(rows, columns)


def layer_of(stored: Any, zeros: Any, scales: Any, group_size: int, bits: int) -> dict[str, Any]:
    """Pack a layer as AutoGPTQ does, zero points less one."""
    lowered = (zeros - 1) & (2**bits - 1)
    return {
        "qweight": pack_rows(stored, bits),
        "qzeros": pack_rows(lowered.t(), bits).t().contiguous(),
        "scales": scales.half(),
        "g_idx": torch.arange(stored.shape[0], dtype=torch.int32) // group_size,
    }


@pytest.mark.parametrize("bits", [4, 8])
@given(data=st.data())
@settings(deadline=None)
def test_packing_and_unpacking_are_inverse(bits: int, data: st.DataObject) -> None:
    """Every matrix comes back from its words, along either side."""
    values = data.draw(grids(bits))
    assert torch.equal(unpack_rows(pack_rows(values, bits), bits), values)
    assert torch.equal(unpack_columns(pack_rows(values.t(), bits).t(), bits), values)


def test_words_hold_the_first_input_in_their_lowest_bits() -> None:
    """The words of a known column are AutoGPTQ's: 1 + 2*16 + ..., the sign bit included."""
    column = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.int32).reshape(8, 1)
    assert pack_rows(column, 4).item() == 0x87654321 - 2**32
    assert pack_rows(torch.tensor([[1], [2], [3], [255]]), 8).item() == 0xFF030201 - 2**32


def test_a_layer_stands_for_its_groups_scaled_integers() -> None:
    """Dense weights are (stored - zero) * scale with each input's own group, transposed to [outputs, inputs]."""
    stored = torch.arange(16 * 8, dtype=torch.int32).reshape(16, 8) % 16
    zeros = torch.stack([torch.full((8,), 8, dtype=torch.int32), torch.arange(1, 9, dtype=torch.int32)])
    scales = torch.stack([torch.full((8,), 0.5), torch.arange(1, 9) / 4])
    layer = layer_of(stored, zeros, scales, group_size=8, bits=4)
    expected = torch.cat([(stored[:8] - 8) * 0.5, (stored[8:] - zeros[1]) * scales[1]]).t()
    assert torch.equal(gptq_integers(layer, 4)[:8], stored[:8] - 8)
    assert torch.equal(gptq_dense(layer, 4), expected)


@given(grids(8))
@settings(deadline=None)
def test_int8_keeps_every_integer(stored: Any) -> None:
    """A per-channel GPTQ layer and its int8 form stand for the same weights, at both ends of the range too."""
    stored[0, 0], stored[-1, -1] = 0, 255
    columns = stored.shape[1]
    layer = layer_of(stored, torch.full((1, columns), 128), torch.linspace(0.1, 0.9, columns)[None], 10**6, bits=8)
    weight, scale = gptq_to_int8(layer)
    assert weight.dtype == torch.int8
    assert scale.shape == (columns, 1)
    assert torch.equal(int8_dense({"weight": weight, "weight_scale": scale}), gptq_dense(layer, 8))
    assert weight.min() == -128
    assert weight.max() == 127


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
@given(data=st.data())
@settings(deadline=None)
def test_packed_words_are_read_as_their_own_library_reads_them(bits: int, sym: bool, data: st.DataObject) -> None:
    """Our dense weights are those of compressed-tensors, for groups, channels, odd sizes and zero points."""
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    outputs, inputs = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([32, 36, 64, 96]))
    groups = data.draw(st.sampled_from([1, 2]))
    integers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (outputs, inputs), dtype=torch.int8)
    zeros = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (outputs, groups), dtype=torch.int8)
    scale = torch.rand(outputs, groups) + 0.5
    layer = {
        "weight_packed": library.pack_to_int32(integers, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    if not sym:
        layer["weight_zero_point"] = library.pack_to_int32(zeros, bits, packed_dim=0)
    spread = inputs // groups
    centre = torch.zeros_like(zeros) if sym else zeros
    expected = (integers.float() - centre.float().repeat_interleave(spread, 1)) * scale.repeat_interleave(spread, 1)
    assert torch.equal(pack_quantized_dense(layer), expected)


def test_a_packed_directory_is_read_whole(tmp_path: Path) -> None:
    """Layers come back by their base's names, dense, and everything else as it is."""
    safetensors = pytest.importorskip("safetensors.torch")
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    integers = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 2)
    tensors = {
        "l.weight_packed": library.pack_to_int32(integers, 4),
        "l.weight_scale": torch.ones(2, 1),
        "l.weight_shape": torch.tensor([2, 32]),
        "norm.weight": torch.ones(2),
    }
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    told = {"format": "pack-quantized", "config_groups": {"a": {"weights": {"num_bits": 4}}}}
    config = {"quantization_config": {"quant_method": "compressed-tensors", **told}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    dense, layers = read_dense(tmp_path)
    assert layers == ("l",)
    assert set(dense) == {"l.weight", "norm.weight"}
    assert torch.equal(dense["l.weight"], integers.float())


def test_a_layers_final_names_follow_the_scheme() -> None:
    """GPTQ layers keep their four tensors; w8a8 layers become weight and scale."""
    stored = torch.zeros((32, 32), dtype=torch.int32)
    parts = layer_of(stored, torch.full((1, 32), 128), torch.ones((1, 32)), 32, bits=8)
    tensors = {f"l.{part}": tensor for part, tensor in parts.items()}
    gptq = {"l.qweight", "l.qzeros", "l.scales", "l.g_idx"}
    assert set(packed_module(tensors, ["l"], "l", preset("w8a16-channel"))) == gptq
    assert set(packed_module(tensors, ["l"], "l", preset("w8a8"))) == {"l.weight", "l.weight_scale"}


@pytest.mark.parametrize(
    "told,expected",
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}, ("gptq", 4, 16)),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True}, ("gptq", 8, 16)),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "int-quantized",
                "config_groups": {"a": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}},
            },
            ("int-quantized", 8, 8),
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {"a": {"weights": {"num_bits": 8, "type": "float"}, "input_activations": None}},
            },
            ("float-quantized", 8, 16),
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("fp8", 8, 8)),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"a": {"weights": {"num_bits": 8}}, "b": {"weights": {"num_bits": 4}}},
            },
            ("pack-quantized", 4, 16),
        ),
    ],
)
def test_packing_is_read_from_the_config(tmp_path: Path, told: dict[str, Any], expected: tuple[str, int, int]) -> None:
    """The quantization_config tells format and bits."""
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": told}))
    packing = read_packing(tmp_path)
    assert (packing.format, packing.bits, packing.activation_bits) == expected


@pytest.mark.parametrize(
    "config,problem",
    [
        (None, "has no config.json with a quantization_config"),
        ("{}", "has no config.json with a quantization_config"),
        ('{"quantization_config": {"quant_method": "awq", "bits": 4}}', "awq with 4 bits can't be read back"),
        (
            '{"quantization_config": {"quant_method": "compressed-tensors", "format": "marlin-24"}}',
            "compressed-tensors with marlin-24 can't be read back",
        ),
    ],
)
def test_what_cant_be_read_back_is_told(tmp_path: Path, config: str | None, problem: str) -> None:
    """A directory of another format is refused by name."""
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(VariantError, match=problem):
        read_packing(tmp_path)
