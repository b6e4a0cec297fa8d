"""The predicted size: against published variants, and by hand."""

from pathlib import Path

import pytest

from config.manifest import Override
from quantize.base import read_base
from quantize.schemes.forecast import packed_bytes, predicted_bytes, predicted_tensors
from quantize.schemes.module_config import WeightArgs
from quantize.schemes.scheme import PRESETS, preset
from tests.quantize.models import write_hollow_model
from tests.quantize.shapes import QWQ_32B


@pytest.mark.parametrize(
    "name,gigabytes", [("w4a16-g128", 19.3), ("w8a16-g128", 35.1), ("w4a16-g32", 21.2), ("w8a8", 34.3)]
)
def test_a_32b_model_has_its_known_size(name: str, gigabytes: float) -> None:
    """QwQ-32B's variants weigh what theirs weigh in the field."""
    assert predicted_bytes(QWQ_32B, preset(name)) / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_a_layer_in_bytes() -> None:
    """Half a byte a weight, then 2.5 bytes an output and group, and 4 bytes an input."""
    assert packed_bytes("m", (64, 256), WeightArgs(4, 128), "gptq") == {
        "m.qweight": 64 * 256 // 2,
        "m.qzeros": 64 * 2 // 2,
        "m.scales": 64 * 2 * 2,
        "m.g_idx": 256 * 4,
    }
    assert packed_bytes("m", (64, 256), WeightArgs(8, -1), "int-quantized") == {
        "m.weight": 64 * 256,
        "m.weight_scale": 64 * 4,
    }


def test_exceptions_count() -> None:
    """A module of 8 bits has twice the integers; one that is kept has its own bytes and name."""
    overrides = (Override(modules="*.down_proj", bits=8), Override(modules="*.layers.0.*"))
    plain = predicted_tensors(QWQ_32B, preset("w4a16-g128"))
    told = predicted_tensors(QWQ_32B, preset("w4a16-g128").model_copy(update={"overrides": overrides}))
    name = "model.layers.1.mlp.down_proj.qweight"
    assert told[name] == 2 * plain[name]
    assert told["model.layers.0.mlp.up_proj.weight"] == QWQ_32B.tensors["model.layers.0.mlp.up_proj.weight"].bytes
    assert "model.layers.0.mlp.up_proj.qweight" not in told
    assert told["lm_head.weight"] == 152064 * 5120 * 2


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_but_linear_layers_changes(name: str) -> None:
    """Embeddings, head, norms and biases are in the forecast as the base has them."""
    told = predicted_tensors(QWQ_32B, preset(name))
    for tensor, stored in QWQ_32B.tensors.items():
        if tensor.removesuffix(".weight") not in QWQ_32B.shapes:
            assert told[tensor] == stored.bytes


def test_zero_points_cost_half_a_byte_a_group() -> None:
    """Beside the scales; the indices of groups, which GPTQ has and pack-quantized has not, are the other difference."""
    module, shape = "m", (256, 1024)
    weights = preset("w4a16-asym-g64").weights
    found = packed_bytes(module, shape, WeightArgs(4, 64), "pack-quantized", weights)
    assert found == {
        "m.weight_packed": 256 * 1024 // 2,
        "m.weight_scale": 256 * 16 * 2,
        "m.weight_shape": 16,
        "m.weight_zero_point": 256 * 16 // 2,
    }
    assert sum(found.values()) == sum(packed_bytes(module, shape, WeightArgs(4, 64)).values()) + 16 - 4 * 1024
    symmetric = packed_bytes(module, shape, WeightArgs(4, 64), "pack-quantized", preset("w4a16-g64").weights)
    assert found.keys() - symmetric.keys() == {"m.weight_zero_point"}


def test_a_base_is_read_without_its_bytes_where_a_forecast_is_all(tmp_path: Path) -> None:
    """Shapes and sizes come from headers; the digest, which reads everything, is left out."""
    base = read_base(write_hollow_model(tmp_path / "base"), digested=False)
    assert base.digest == ""
    assert sum(tensor.bytes for tensor in base.tensors.values()) == 2 * (8 * 576 + 576 * 576 + 576 * 1536 + 576)
