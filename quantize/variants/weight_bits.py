"""The fewest bits of a weight, by a directory's quantization_config: which limits its quality is held against."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.errors import VariantError

UNQUANTIZED_BITS = 16
_BITS_BY_METHOD = {"fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4, "modelopt": 8, "modelopt_fp4": 4}


def read_weight_bits(directory: Path) -> int:
    """Read the fewest bits from a directory's config.json; VariantError if they are unknown."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        raise VariantError(f"{directory}: has no readable config.json; is it a model?") from None
    quantization = config.get("quantization_config")
    bits = weight_bits(quantization) if isinstance(quantization, dict) else UNQUANTIZED_BITS
    if bits is None:
        method = quantization.get("quant_method")
        raise VariantError(f"{directory}: the bits of quant_method {method!r} are not known, nor its limits")
    return bits


def weight_bits(config: Mapping[str, Any]) -> int | None:
    """Tell the fewest bits of a quantization_config; None if they aren't known."""
    method = str(config.get("quant_method", "")).lower()
    if method == "bitsandbytes":
        return 4 if config.get("load_in_4bit") else 8
    groups = config.get("config_groups")
    if isinstance(groups, dict):
        found = [bits for group in groups.values() if isinstance(bits := _group_bits(group), int)]
    else:
        found = [bits for key in ("bits", "w_bit") if isinstance(bits := config.get(key), int)]
    return min(found, default=_BITS_BY_METHOD.get(method))


def _group_bits(group: Mapping[str, Any]) -> int | None:
    weights = group.get("weights")
    return weights.get("num_bits") if isinstance(weights, dict) else None
