"""The fewest bits of a weight, by what tools write into a config.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from quantize.errors import VariantError
from quantize.variants.weight_bits import read_weight_bits

GROUPS = {"a": {"weights": {"num_bits": 8}}, "b": {"weights": {"num_bits": 4}}, "c": {"weights": None}}


@pytest.mark.parametrize(
    "config, bits",
    [
        (None, 16),
        ({"quant_method": "gptq", "bits": 4}, 4),
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "awq", "w_bit": 4}, 4),
        ({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": GROUPS}, 4),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "mxfp4"}, 4),
    ],
)
def test_bits_of_a_configuration(tmp_path: Path, config: dict[str, Any] | None, bits: int) -> None:
    """Of several groups, the fewest; an unquantized model has 16."""
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    assert read_weight_bits(tmp_path) == bits


def test_a_method_that_is_not_known(tmp_path: Path) -> None:
    """Without bits there are no limits to hold it against."""
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "quip"}}))
    with pytest.raises(VariantError, match="the bits of quant_method 'quip' are not known"):
        read_weight_bits(tmp_path)
    with pytest.raises(VariantError, match="has no readable config"):
        read_weight_bits(tmp_path / "none")
