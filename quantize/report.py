"""Manifests as text for people: one line, a table, a page."""

from collections.abc import Sequence
from pathlib import Path

from config.manifest import Calibration, Manifest, Quality

_HEADINGS = ("variant", "scheme", "size", "KL mean", "top-1", "perplexity", "verdict", "directory")


def summary(manifest: Manifest, directory: Path) -> str:
    """Tell a variant in one line."""
    return f"{manifest.id}  {directory}  {_megabytes(manifest.bytes)}  {quality_line(manifest.quality)}"


def quality_line(quality: Quality) -> str:
    """Tell a quality in one line."""
    failed = [check.name for check in quality.checks if not check.passed]
    because = f" ({', '.join(failed)})" if failed else ""
    return (
        f"KL {quality.kl_mean:.4f}  top-1 {quality.top1_agreement:.1%}  "
        f"perplexity x{quality.perplexity_ratio:.4f}  {quality.verdict}{because}"
    )


def listing(variants: Sequence[tuple[Path, Manifest]]) -> str:
    """Tell variants as an aligned table."""
    rows = [_HEADINGS, *(_row(directory, manifest) for directory, manifest in variants)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def page(manifest: Manifest, directory: Path) -> str:
    """Tell everything about a variant, a fact a line."""
    quality, made, text = manifest.quality, manifest.quantizer, manifest.calibration
    damp = ", ".join(f"{count} modules at {value}" for value, count in made.damp.items())
    lines = [
        f"variant      {manifest.id}",
        f"directory    {directory}",
        f"base         {manifest.base.name} ({manifest.base.dtype}, {manifest.base.digest[:12]})",
        f"scheme       {manifest.scheme.name} ({manifest.scheme.format})",
        f"size         {_megabytes(manifest.bytes)} in {len(manifest.files)} files",
        f"made         {manifest.created:%Y-%m-%d %H:%M} UTC by {made.backend} {made.version} in {made.seconds:.0f} s",
        f"damping      {damp}",
        f"calibration  {_calibration(text)}",
        f"evaluation   {quality.tokens} held-out tokens",
        f"kl_p99       {quality.kl_p99:.4f}",
        *(_check_line(check.name, check.value, check.limit, check.passed) for check in quality.checks),
        f"verdict      {quality.verdict}",
    ]
    return "\n".join(lines)


def _calibration(text: Calibration | None) -> str:
    if text is None:
        return "unknown: made elsewhere, and adopted"
    return f"{text.samples} chats, {text.tokens} tokens, {text.reasoning_tokens} of them reasoning"


def _row(directory: Path, manifest: Manifest) -> tuple[str, ...]:
    quality = manifest.quality
    return (
        manifest.id,
        manifest.scheme.name,
        _megabytes(manifest.bytes),
        f"{quality.kl_mean:.4f}",
        f"{quality.top1_agreement:.1%}",
        f"x{quality.perplexity_ratio:.4f}",
        quality.verdict,
        str(directory),
    )


def _check_line(name: str, value: float, limit: float, passed: bool) -> str:
    return f"{name:<16} {value:.4f} against {limit:g}: {'passed' if passed else 'failed'}"


def _megabytes(count_bytes: int) -> str:
    return f"{count_bytes / 1e6:.0f} MB"
