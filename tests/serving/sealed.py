"""Sealed variants for tests of serving: any files of a directory, under a manifest that somebody measured."""

from datetime import UTC, datetime
from pathlib import Path

from config.manifest import FILE_NAME, Base, Manifest, Quantizer, Scheme, SealedFile, sha256_of
from config.quality import Quality
from config.quantization import grouped


def seal_directory(directory: Path) -> Manifest:
    """Write a manifest over the files that are there."""
    files = {
        path.name: SealedFile(sha256=sha256_of(path), bytes=path.stat().st_size)
        for path in sorted(directory.iterdir())
        if path.name != FILE_NAME
    }
    figures = {"kl_mean": 0.01, "kl_p99": 0.1, "top1_agreement": 0.95, "perplexity_ratio": 1.01}
    manifest = Manifest(
        id="smol-int4-01234567",
        created=datetime(2026, 1, 1, tzinfo=UTC),
        base=Base(name="smol", digest="0" * 64, dtype="bf16"),
        scheme=Scheme(name="w4a16-g64", compression="gptq", weights=grouped(4, 64)),
        quantizer=Quantizer(backend="gptqmodel", version="7.6.0", modules=7),
        quality=Quality(dataset_sha256="0", tokens=9, verdict="pass", **figures),
        files=files,
    )
    (directory / FILE_NAME).write_text(manifest.to_json())
    return manifest
