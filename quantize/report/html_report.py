"""Variants as one self-contained HTML page: no script and no request, readable on paper."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from config.capacity import FILE_NAME as CAPACITY_FILE
from config.capacity import Capacity, read_capacity
from config.curves import mixes
from config.manifest import Base, Manifest
from quantize.errors import VariantError
from quantize.report.figures import (
    Figure,
    histogram_figure,
    latency_figures,
    loss_figure,
    quality_figure,
    speed_figures,
)
from quantize.report.tables import Cell, Table, overview, provenance, quality_tables, verdict
from quantize.report.variant_record import CompletionPair, VariantRecord, WorstSample, read_variant_record

WORST_SAMPLES = 8
PAIRED_COMPLETIONS = 3


@dataclass(frozen=True, slots=True)
class Article:
    """A variant on the page; `blocks` are tables, figures, and sentences for what is missing."""

    anchor: str
    id: str
    verdict: Cell
    blocks: tuple[Table | Figure | str, ...]
    worst: tuple[WorstSample, ...]
    completions: tuple[CompletionPair, ...]
    provenance: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A base with its variants, the closest to it first."""

    base: Base
    blocks: tuple[Table | Figure | str, ...]
    articles: tuple[Article, ...]


def write_report(variants: Sequence[tuple[Path, Manifest]], out: Path, base: Path | None = None) -> None:
    """Write the report about variants; with the directory of their base, its measured speed is included.

    It replaces an existing file atomically. VariantError if a file of a variant is invalid, or `base` is the base of
    none of them.
    """
    records = [read_variant_record(directory, manifest) for directory, manifest in variants]
    capacities = {base.resolve().name: read_capacity(base / CAPACITY_FILE)} if base else {}
    for unknown in capacities.keys() - {record.manifest.base.name for record in records}:
        raise VariantError(f"{base}: none of these variants was made from {unknown}; omit --against")
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        draft.write_text(html_page(records, capacities), encoding="utf-8")
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def html_page(records: Sequence[VariantRecord], base_capacities: Mapping[str, Capacity]) -> str:
    """Render the page: a section for each base; `base_capacities` has the measured speed of bases, by name."""
    ordered = sorted(records, key=_base_key)
    groups = [list(group) for _, group in groupby(ordered, key=_base_key)]
    sections = [_section(number, group, base_capacities) for number, group in enumerate(groups)]
    environment = Environment(
        loader=PackageLoader("quantize.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    return environment.get_template("report.html.jinja").render(sections=sections, variants=len(records))


def visible(token: str) -> str:
    """Show line ends and tabs of a token, and its spaces if it has nothing else."""
    text = token.replace("\n", "⏎").replace("\t", "⇥")
    return text if token.strip() else text.replace(" ", "␣")


def _base_key(record: VariantRecord) -> tuple[str, str]:
    return record.manifest.base.name, record.manifest.base.digest


def _section(number: int, group: Sequence[VariantRecord], base_capacities: Mapping[str, Capacity]) -> Section:
    ranked = sorted(group, key=lambda record: record.manifest.quality.kl_mean)
    anchors = [f"v{number}-{rank}" for rank in range(len(ranked))]
    base = ranked[0].manifest.base
    blocks = (
        overview(list(zip(anchors, ranked, strict=True))),
        *_comparability(ranked),
        quality_figure(f"quality{number}", ranked),
        *_speed(number, ranked, base_capacities.get(base.name)),
    )
    return Section(base, blocks, tuple(_article(*pair) for pair in zip(anchors, ranked, strict=True)))


def _comparability(records: Sequence[VariantRecord]) -> Iterator[str]:
    texts = {(record.manifest.quality.dataset_sha256, record.manifest.quality.tokens) for record in records}
    if len(texts) > 1:
        yield f"Evaluated on {len(texts)} different texts: small differences between variants are not significant."


def _speed(number: int, records: Sequence[VariantRecord], base: Capacity | None) -> Iterator[Figure | str]:
    figures: list[Figure | str] = list(speed_figures(f"speed{number}", records))
    yield from figures or ["Speed: not measured (no capacity.json; `quantgate measure` writes it)."]
    yield from latency_figures(f"latency{number}", records, base)
    capacities = [record.capacity for record in records] + ([base] if base else [])
    if len(mixes(capacities)) > 1:
        yield "Measured with different request mixes: the speeds are not comparable."


def _article(anchor: str, record: VariantRecord) -> Article:
    quality, evaluation = record.manifest.quality, record.evaluation
    loss = loss_figure(f"{anchor}-loss", record.modules)
    histogram = histogram_figure(f"{anchor}-kl", evaluation.kl_histogram)
    return Article(
        anchor=anchor,
        id=record.manifest.id,
        verdict=verdict(quality.verdict),
        blocks=(
            *quality_tables(quality),
            loss or "Losses: not recorded (no quant_log.json).",
            histogram or "Distribution of KL divergence: not recorded (no evaluation.json).",
        ),
        worst=evaluation.worst[:WORST_SAMPLES],
        completions=evaluation.generations[:PAIRED_COMPLETIONS],
        provenance=provenance(record),
    )
