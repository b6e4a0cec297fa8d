"""Tables of the HTML report, from manifests alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from config.manifest import Manifest
from config.quality import Generation, Quality, Tasks, Verdict
from quantize.report.text_report import coverage_line, interval_text
from quantize.report.variant_record import VariantRecord


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell that is a link into the page, or a verdict."""

    text: str
    anchor: str = ""
    passed: bool | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings; the columns from `first_number` on hold numbers, `verdict` excepted."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell | str, ...], ...]
    first_number: int = 1


def overview(records: Sequence[tuple[str, VariantRecord]]) -> Table:
    """The variants of a base, with the anchors of their articles."""
    headings = ("variant", "scheme", "MB", "mean KL", "top-1", "perplexity", "length", "verdict")
    rows = tuple(
        (
            Cell(record.manifest.id, anchor=anchor),
            record.manifest.scheme.name,
            f"{record.manifest.bytes / 1e6:,.1f}",
            f"{record.manifest.quality.kl_mean:.4f}",
            f"{record.manifest.quality.top1_agreement:.2%}",
            f"x{record.manifest.quality.perplexity_ratio:.4f}",
            _ratio(record.manifest.quality.length_ratio),
            verdict(record.manifest.quality.verdict),
        )
        for anchor, record in records
    )
    return Table("Variants by mean KL divergence from the base", headings, rows, first_number=2)


def verdict(given: Verdict) -> Cell:
    """A verdict as a mark and a word, not only a colour."""
    marks: Mapping[Verdict, str] = {"pass": "✓", "fail": "✗", "not shown": "?"}
    return Cell(f"{marks[given]} {given}", passed=None if given == "not shown" else given == "pass")


def quality_tables(quality: Quality) -> Iterator[Table | str]:
    """Checks, subsets of the tokens, paired completions and tasks; a sentence for what was not measured."""
    yield _checks(quality) if quality.checks else "No limits were set."
    subsets = _subsets(quality)
    yield subsets if subsets.rows else "Not measured for reasoning, answers and prompts separately."
    generation = quality.generation
    yield _generation(generation, quality.length_ratio) if generation else "No paired generations."
    if quality.tasks:
        yield _tasks(quality.tasks)


def provenance(record: VariantRecord) -> tuple[tuple[str, str], ...]:
    """How a variant was made, as pairs of name and value."""
    manifest = record.manifest
    quantizer, scheme = manifest.quantizer, manifest.scheme
    seconds = f"{quantizer.seconds:,.0f} s for {quantizer.modules} modules" if quantizer.seconds else "unknown"
    overrides = [(f"override {rule.modules}", _override(rule.bits, rule.group_size)) for rule in scheme.overrides]
    files = [(name, f"{file.bytes:,} bytes, sha256 {file.sha256[:16]}…") for name, file in manifest.files.items()]
    return (
        ("directory", record.directory.name),
        ("created", f"{manifest.created:%Y-%m-%d %H:%M} UTC by {quantizer.backend} {quantizer.version}"),
        ("duration", seconds),
        ("scheme", f"{scheme.bits} bits, group size {scheme.group_size}, activations {scheme.activation_bits} bits"),
        ("format", scheme.format),
        *overrides,
        *((key.replace("_", " "), str(value)) for key, value in quantizer.settings.items()),
        *((("experts", coverage_line(quantizer.experts)),) if quantizer.experts else ()),
        ("damping", ", ".join(f"{count} modules at {damp}" for damp, count in quantizer.damp.items()) or "unknown"),
        ("calibration", _calibration(manifest)),
        ("evaluation text", manifest.quality.dataset_sha256[:16]),
        *files,
    )


def _ratio(value: float | None) -> str:
    return "not measured" if value is None else f"x{value:.3f}"


def _checks(quality: Quality) -> Table:
    rows = tuple(
        (check.name, f"{check.value:.4g}", interval_text(check.interval), f"{check.limit:g}", verdict(check.verdict))
        for check in quality.checks
    )
    chats = f" of {quality.chats:,} chats" if quality.chats else ""
    caption = f"Checks, on {quality.tokens:,} held-out tokens{chats}"
    return Table(caption, ("check", "value", "95 % interval", "limit", "verdict"), rows)


def _subsets(quality: Quality) -> Table:
    headings = ("tokens of", "tokens", "mean KL", "top-1", "perplexity")
    rows = tuple(
        (name, f"{part.tokens:,}", f"{part.kl_mean:.4f}", f"{part.top1_agreement:.2%}", f"x{part.perplexity_ratio:.4f}")
        for name, part in (("reasoning", quality.reasoning), ("answer", quality.answer), ("prompt", quality.prompt))
        if part
    )
    return Table("Quality on subsets of the tokens", headings, rows)


def _generation(generation: Generation, length_ratio: float | None) -> Table:
    ratio = generation.length_ratio if length_ratio is None else length_ratio
    caption = (
        f"Paired completions: {generation.prompts} prompts, {generation.seeds} seeds each, up to "
        f"{generation.new_tokens} tokens; length ratio x{ratio:.3f}"
    )
    rates = (
        ("did not stop", generation.parent_unfinished, generation.unfinished),
        ("ended in repetition", generation.parent_repeating, generation.repeating),
        ("left <think> open", generation.parent_unclosed, generation.unclosed),
    )
    rows = tuple((name, f"{parent:.1%}", f"{variant:.1%}") for name, parent, variant in rates)
    return Table(caption, ("share of completions", "base", "variant"), rows)


def _tasks(tasks: Tasks) -> Table:
    shares = (tasks.parent_accuracy, tasks.accuracy, tasks.recovery, tasks.flips)
    row = (f"{tasks.items:,}", *(f"{share:.1%}" for share in shares))
    headings = ("questions", "base accuracy", "variant accuracy", "recovery", "flips")
    return Table("Tasks with known answers", headings, (row,), first_number=0)


def _override(bits: int | None, group_size: int | None) -> str:
    return "not quantized" if bits is None else f"{bits} bits, group size {group_size or 'of the scheme'}"


def _calibration(manifest: Manifest) -> str:
    calibration = manifest.calibration
    if calibration is None:
        return "unknown: quantized by another tool and adopted"
    skipped = f"; invalid rows skipped: {calibration.skipped_rows}" if calibration.skipped_rows else ""
    return (
        f"{calibration.samples} samples, {calibration.tokens:,} tokens, {calibration.reasoning_tokens:,} of them "
        f"reasoning{skipped}; {calibration.generated} generated by the base; seed {calibration.seed}; truncated at "
        f"{calibration.max_tokens:,} tokens"
    )
