"""Variants as plain text: one line, a table, or a fact per line."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from config.manifest import Calibration, ExpertCoverage, Manifest
from config.quality import Check, Interval, Quality
from quantize.running.stage_store import StageEntry
from quantize.variants.pruning import Disposable

_NAMES_SHOWN = 5
_OF_COMPLETIONS = ("length_ratio", "unfinished_increase", "repeating_increase", "unclosed_increase")
_HEADINGS = ("variant", "scheme", "size", "KL mean", "top-1", "perplexity", "verdict", "directory")


def summary_line(manifest: Manifest, directory: Path) -> str:
    """Format a variant as one line."""
    return f"{manifest.id}  {directory}  {_megabytes(manifest.bytes)}  {quality_line(manifest.quality)}"


def quality_line(quality: Quality) -> str:
    """Format quality and verdict as one line, with the checks that did not pass and what would decide them."""
    reasons = [_reason(check) for check in quality.checks if check.verdict == quality.verdict != "pass"]
    because = f" ({', '.join(reasons)})" if reasons else ""
    return (
        f"KL {quality.kl_mean:.4f}{_at(quality, 'kl_mean', '.4f')}  "
        f"top-1 {quality.top1_agreement:.1%}{_at(quality, 'top1_agreement', '.1%')}  "
        f"perplexity x{quality.perplexity_ratio:.4f}  {quality.verdict}{because}"
    )


def interval_text(interval: Interval | None) -> str:
    """Format an interval; nothing for a figure that has none."""
    if interval is None:
        return ""
    low, high = ("unknown" if end is None else f"{end:.4g}" for end in (interval.low, interval.high))
    return f"{low} to {high}"


def needed_text(check: Check) -> str:
    """Say what would decide a check that is not shown."""
    if check.more_chats is None and check.interval and check.interval.high is None:
        cut = "too many completions were cut; raise --eval-new-tokens"
        return cut if check.name in _OF_COMPLETIONS else "a single chat or question has no interval"
    if check.more_chats is None:
        return "the value lies at the limit"
    what = "questions" if check.name in ("recovery", "flips") else "chats"
    return f"needs about {check.more_chats:,} more {what}"


def _reason(check: Check) -> str:
    return f"{check.name}: {needed_text(check)}" if check.verdict == "not shown" else check.name


def _at(quality: Quality, figure: str, form: str) -> str:
    """Format how far a figure's interval reaches to either side."""
    interval = quality.intervals.get(figure)
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return f" ({interval.low:{form}} to {interval.high:{form}})"


def variant_table(variants: Sequence[tuple[Path, Manifest]]) -> str:
    """Format variants as an aligned table."""
    rows = [_HEADINGS, *(_row(directory, manifest) for directory, manifest in variants)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def variant_text(manifest: Manifest, directory: Path) -> str:
    """Format everything in a manifest, a fact per line."""
    return "\n".join(
        f"{name:<12} {value}"
        for name, value in (
            ("variant", manifest.id),
            ("directory", directory),
            ("base", f"{manifest.base.name} ({manifest.base.dtype}, {manifest.base.digest[:12]})"),
            *_provenance(manifest),
            *_quality(manifest.quality),
        )
    )


def disposal_lines(disposables: Sequence[Disposable]) -> list[str]:
    """Format what can be removed, a directory per line, and the total size."""
    if not disposables:
        return ["nothing to remove"]
    lines = [f"{_megabytes(one.bytes):>10}  {one.path}  {one.reason}" for one in disposables]
    return [*lines, f"{_megabytes(sum(one.bytes for one in disposables)):>10}  total"]


def _provenance(manifest: Manifest) -> Iterator[tuple[str, str]]:
    quantizer, scheme = manifest.quantizer, manifest.scheme
    yield "scheme", f"{scheme.name} ({scheme.format})"
    for override in scheme.overrides:
        group_size = override.group_size or scheme.group_size
        setting = f"{override.bits} bits, group size {group_size}" if override.bits else "not quantized"
        yield "override", f"{override.modules}: {setting}"
    yield "size", f"{_megabytes(manifest.bytes)} in {len(manifest.files)} files"
    duration = f" in {quantizer.seconds:.0f} s" if quantizer.seconds else ""
    yield "created", f"{manifest.created:%Y-%m-%d %H:%M} UTC by {quantizer.backend} {quantizer.version}{duration}"
    if quantizer.settings:
        yield "settings", ", ".join(f"{name} {value}" for name, value in quantizer.settings.items())
    if quantizer.damp:
        yield "damping", ", ".join(f"{count} modules at {damp}" for damp, count in quantizer.damp.items())
    if quantizer.fallback_modules:
        yield "RTN", f"rounded to nearest, GPTQ failed: {', '.join(quantizer.fallback_modules)}"
    if quantizer.experts:
        yield "experts", coverage_line(quantizer.experts)
    yield "calibration", _calibration(manifest.calibration)


def coverage_line(coverage: ExpertCoverage) -> str:
    """Format how many tokens the experts saw, and which were rounded to nearest."""
    few = coverage.undersampled
    rounded = f", {len(few)} too few and were rounded to nearest: {', '.join(few[:_NAMES_SHOWN])}" if few else ""
    more = f" and {len(few) - _NAMES_SHOWN} more" if len(few) > _NAMES_SHOWN else ""
    return (
        f"{coverage.experts} experts saw {coverage.fewest_tokens:,} tokens or more, "
        f"half of them {coverage.median_tokens:,} or more{rounded}{more}"
    )


def _quality(quality: Quality) -> Iterator[tuple[str, str]]:
    chats = f" of {quality.chats} chats" if quality.chats else ""
    method = f", measured by {quality.method}" if quality.method else ""
    yield "evaluation", f"{quality.tokens} held-out tokens{chats}{method}"
    if quality.longest_position is not None:
        yield "position", f"{quality.longest_position}, the longest context that was compared"
    if quality.kl_floor is not None:
        yield "kl_floor", f"{quality.kl_floor:.2g}, the parent's divergence from itself"
    yield "kl_p99", f"{quality.kl_p99:.4f}"
    for name, part in (("reasoning", quality.reasoning), ("answer", quality.answer), ("prompt", quality.prompt)):
        if part:
            metrics = f"KL {part.kl_mean:.4f}, top-1 {part.top1_agreement:.1%}, perplexity x{part.perplexity_ratio:.4f}"
            yield name, f"{part.tokens} tokens: {metrics}"
    for check in quality.checks:
        interval = f" ({interval_text(check.interval)})" if check.interval else ""
        needs = f", {needed_text(check)}" if check.verdict == "not shown" else ""
        yield "check", f"{check.name} {check.value:.4f}{interval}, limit {check.limit:g}: {check.verdict}{needs}"
    yield "verdict", quality.verdict


def stage_listing(entries: Sequence[StageEntry], root: Path) -> str:
    """List the results of stages: stage, size, last use, and what they belong to."""
    if not entries:
        return f"no stages in {root}"
    lines = [
        f"{entry.name:<14} {_megabytes(entry.bytes):>10}  "
        f"{datetime.fromtimestamp(entry.used_seconds, UTC):%Y-%m-%d %H:%M}  {_stage_state(entry)}  {entry.path.name}"
        for entry in entries
    ]
    return "\n".join([*lines, f"{'together':<14} {_megabytes(sum(entry.bytes for entry in entries)):>10}  in {root}"])


def _stage_state(entry: StageEntry) -> str:
    if entry.unfinished:
        return "unfinished: the same command continues it"
    return entry.subject if entry.evictable else f"{entry.subject}, not sealed yet"


def _calibration(calibration: Calibration | None) -> str:
    if calibration is None:
        return "unknown: quantized by another tool and adopted"
    generated = f"; {calibration.generated} generated by the base" if calibration.generated else ""
    skipped = f"; invalid rows skipped: {calibration.skipped_rows}" if calibration.skipped_rows else ""
    tokens = f"{calibration.tokens} tokens, {calibration.reasoning_tokens} of them reasoning"
    return f"{calibration.samples} samples, {tokens}{generated}{skipped}"


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
