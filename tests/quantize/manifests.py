"""Manifests for tests, with any part changed."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from config.manifest import Base, Calibration, Manifest, Quantizer, SealedFile
from config.quality import Check, Quality
from quantize.schemes.scheme import preset


def quality(**changes: Any) -> Quality:
    """A quality that passed."""
    figures: dict[str, Any] = {
        "dataset_sha256": "d" * 64,
        "tokens": 4000,
        "kl_mean": 0.04,
        "kl_p99": 0.4,
        "top1_agreement": 0.94,
        "perplexity_ratio": 1.02,
        "checks": (Check(name="kl_mean", value=0.04, limit=0.05, passed=True),),
        "verdict": "pass",
    }
    return Quality(**figures | changes)


def manifest(**changes: Any) -> Manifest:
    """A variant that our own pipeline made."""
    parts: dict[str, Any] = {
        "id": "smol-int4-01234567",
        "created": datetime(2026, 11, 1, tzinfo=UTC),
        "base": Base(name="smol", digest="b" * 64, dtype="bf16"),
        "scheme": preset("w4a16-g64"),
        "calibration": Calibration(sha256="c", samples=16, tokens=100, reasoning_tokens=50, max_tokens=2048, seed=0),
        "quantizer": Quantizer(backend="gptqmodel", version="7.6.0", seconds=1.0, damp={"0.01": 7}, modules=7),
        "quality": quality(),
        "files": {"model.safetensors": SealedFile(sha256="e" * 64, bytes=7_000_000)},
    }
    return Manifest(**parts | changes)


def write_manifest(directory: Path, **changes: Any) -> Manifest:
    """Write a directory with a manifest, and nothing of what it promises."""
    directory.mkdir(parents=True)
    told = manifest(**changes)
    (directory / "manifest.json").write_text(told.to_json())
    return told
