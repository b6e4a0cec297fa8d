"""A small variant directory with a manifest, for tests."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from config.manifest import Manifest, SealedFile, sha256_of

QUALITY = {
    "dataset_sha256": "d",
    "tokens": 100,
    "kl_mean": 0.02,
    "kl_p99": 0.4,
    "top1_agreement": 0.95,
    "perplexity_ratio": 1.01,
    "verdict": "pass",
}


def manifest_of(bits: int) -> dict[str, Any]:
    """Return the fields of a manifest."""
    return {
        "id": f"tiny-int{bits}-0badcafe",
        "created": datetime(2026, 1, 1, tzinfo=UTC),
        "base": {"name": "tiny", "digest": "b", "dtype": "bf16"},
        "scheme": {
            "name": f"w{bits}a16-g64",
            "bits": bits,
            "group_size": 64,
            "sym": True,
            "desc_act": False,
            "activation_bits": 16,
            "format": "gptq",
        },
        "calibration": {
            "sha256": "c",
            "samples": 16,
            "tokens": 1000,
            "reasoning_tokens": 500,
            "max_tokens": 2048,
            "seed": 0,
        },
        "quantizer": {
            "backend": "gptqmodel",
            "version": "7.6.0",
            "seconds": 1.0,
            "damp": {"0.01": 1},
            "modules": 1,
            "fallback_modules": [],
        },
        "quality": QUALITY,
        "files": {"model.safetensors": {"sha256": "0", "bytes": 7}},
    }


def seal(folder: Path, bits: int, verdict: str = "pass") -> Manifest:
    """Write a weight file, a model config and their manifest."""
    weights = folder / "model.safetensors"
    weights.write_bytes(b"weights")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq", "bits": bits}}))
    files = {weights.name: SealedFile(sha256=sha256_of(weights), bytes=7)}
    manifest = Manifest.model_validate(
        {**manifest_of(bits), "files": files, "quality": {**QUALITY, "verdict": verdict}}
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return manifest
