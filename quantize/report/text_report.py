"""Manifests as text for people: one line, a table, a page."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from config.manifest import Calibration, ExpertCoverage, Manifest, Quality
from quantize.variants.pruning import Disposable

_NAMES_SHOWN = 5
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
    return "\n".join(
        f"{name:<12} {value}"
        for name, value in (
            ("variant", manifest.id),
            ("directory", directory),
            ("base", f"{manifest.base.name} ({manifest.base.dtype}, {manifest.base.digest[:12]})"),
            *_making(manifest),
            *_measuring(manifest.quality),
        )
    )


def _making(manifest: Manifest) -> Iterator[tuple[str, str]]:
    made, scheme = manifest.quantizer, manifest.scheme
    yield "scheme", f"{scheme.name} ({scheme.format})"
    for override in scheme.overrides:
        numbers = (
            f"{override.bits} bits, group size {override.group_size or scheme.group_size}"
            if override.bits
            else "as in the base"
        )
        yield "exception", f"{override.modules}: {numbers}"
    yield "size", f"{_megabytes(manifest.bytes)} in {len(manifest.files)} files"
    took = f" in {made.seconds:.0f} s" if made.seconds else ""
    yield "made", f"{manifest.created:%Y-%m-%d %H:%M} UTC by {made.backend} {made.version}{took}"
    if made.settings:
        yield "settings", ", ".join(f"{name} {value}" for name, value in made.settings.items())
    if made.damp:
        yield "damping", ", ".join(f"{count} modules at {value}" for value, count in made.damp.items())
    if made.fallback_modules:
        yield "rounded", f"to nearest, not solved: {', '.join(made.fallback_modules)}"
    if made.experts:
        yield "experts", _experts(made.experts)
    yield "calibration", _calibration(manifest.calibration)


def _experts(coverage: ExpertCoverage) -> str:
    few = coverage.undersampled
    rounded = f", {len(few)} of them too few and rounded to nearest: {', '.join(few[:_NAMES_SHOWN])}" if few else ""
    more = f" and {len(few) - _NAMES_SHOWN} more" if len(few) > _NAMES_SHOWN else ""
    return (
        f"{coverage.experts} experts saw {coverage.fewest_tokens:,} tokens or more, "
        f"half of them {coverage.median_tokens:,}{rounded}{more}"
    )


def _measuring(quality: Quality) -> Iterator[tuple[str, str]]:
    yield "evaluation", f"{quality.tokens} held-out tokens"
    yield "kl_p99", f"{quality.kl_p99:.4f}"
    for name, part in (("reasoning", quality.reasoning), ("answer", quality.answer)):
        if part:
            figures = f"KL {part.kl_mean:.4f}, top-1 {part.top1_agreement:.1%}, perplexity x{part.perplexity_ratio:.4f}"
            yield name, f"{part.tokens} tokens: {figures}"
    for check in quality.checks:
        verdict = "passed" if check.passed else "failed"
        yield "check", f"{check.name} {check.value:.4f} against {check.limit:g}: {verdict}"
    yield "verdict", quality.verdict


def disposal_lines(found: Sequence[Disposable]) -> list[str]:
    """Tell what can be removed, a directory a line, and what that frees."""
    if not found:
        return ["nothing to remove"]
    lines = [f"{_megabytes(disposable.bytes):>10}  {disposable.path}  {disposable.reason}" for disposable in found]
    return [*lines, f"{_megabytes(sum(disposable.bytes for disposable in found)):>10}  together"]


def _calibration(text: Calibration | None) -> str:
    if text is None:
        return "unknown: made elsewhere, and adopted"
    written = f"; {text.generated} written by the base itself" if text.generated else ""
    skipped = f"; invalid rows skipped: {text.skipped_rows}" if text.skipped_rows else ""
    return f"{text.samples} chats, {text.tokens} tokens, {text.reasoning_tokens} of them reasoning{written}{skipped}"


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


def _megabytes(count_bytes: int) -> str:
    return f"{count_bytes / 1e6:.0f} MB"
