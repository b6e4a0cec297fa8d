"""Variants as one self-contained HTML page: no request leaves it, it needs no script, and it is fit to be printed."""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from config.capacity import FILE_NAME as CAPACITY_FILE
from config.capacity import Capacity, read_capacity
from config.manifest import Manifest
from quantize.errors import VariantError
from quantize.report.html_sections import number_cell, table, variant_article, verdict_mark
from quantize.report.html_speed import LEAST_KL, latency_plots, speed_plots
from quantize.report.markup import Markup, element
from quantize.report.plots import Point, Series, legend, linear_axis, log_axis, scatter
from quantize.report.variant_record import VariantRecord, read_variant_record

_STYLE = Path(__file__).with_name("report.css")


def write_report(variants: Sequence[tuple[Path, Manifest]], out: Path, base: Path | None = None) -> None:
    """Write the page about variants, with the speed of their base if its directory is given.

    It replaces an older page at once.
    """
    records = [read_variant_record(directory, manifest) for directory, manifest in variants]
    parents = {base.resolve().name: read_capacity(base / CAPACITY_FILE)} if base else {}
    for stranger in parents.keys() - {one.manifest.base.name for one in records}:
        raise VariantError(f"{base}: none of these variants was made from {stranger}; leave --against out")
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        draft.write_text(html_page(records, _STYLE.read_text(), parents), encoding="utf-8")
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def html_page(records: Sequence[VariantRecord], style: str, parents: Mapping[str, Capacity]) -> str:
    """Build the page: a section for each base, in it a table, plots, and an article for each variant.

    `parents` holds what was measured of the speed of bases, by name.
    """
    ordered = sorted(records, key=_base_of)
    groups = [list(group) for _, group in groupby(ordered, key=_base_of)]
    names = ", ".join(group[0].manifest.base.name for group in groups)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"Variants of {names}"),
        element("style", Markup(style)),
    )
    count = f"{len(records)} variant{'s' if len(records) > 1 else ''}, measured against the model they were made from"
    header = element("header", element("h1", f"Variants of {names}"), element("p", count, class_="quiet"))
    main = element("main", *(_base_section(number, group, parents) for number, group in enumerate(groups)))
    return f"<!doctype html>\n{element('html', head, element('body', header, main), lang='en')}\n"


def _base_of(record: VariantRecord) -> tuple[str, str]:
    return record.manifest.base.name, record.manifest.base.digest


def _base_section(number: int, group: Sequence[VariantRecord], parents: Mapping[str, Capacity]) -> Markup:
    base = group[0].manifest.base
    ranked = sorted(group, key=lambda one: one.manifest.quality.kl_mean)
    anchors = {id(one): f"v{number}-{place}" for place, one in enumerate(ranked)}
    return element(
        "section",
        element("h2", f"Base {base.name}"),
        element("p", f"{base.dtype}, digest ", element("code", base.digest[:16]), class_="quiet"),
        _overview([(anchors[id(one)], one) for one in ranked]),
        *_comparability(ranked),
        _quality_plot(f"quality{number}", ranked),
        *speed_plots(f"speed{number}", ranked),
        *latency_plots(f"latency{number}", ranked, parents.get(base.name)),
        *(variant_article(anchors[id(one)], one) for one in ranked),
    )


def _overview(rows: Sequence[tuple[str, VariantRecord]]) -> Markup:
    heads = ["variant", "scheme", "MB", "mean KL", "top-1", "perplexity", "length", "verdict"]
    cells = [
        (
            element("a", one.manifest.id, href=f"#{anchor}"),
            one.manifest.scheme.name,
            number_cell(f"{one.manifest.bytes / 1e6:,.1f}"),
            number_cell(f"{one.manifest.quality.kl_mean:.4f}"),
            number_cell(f"{one.manifest.quality.top1_agreement:.2%}"),
            number_cell(f"x{one.manifest.quality.perplexity_ratio:.4f}"),
            number_cell(_length(one.manifest)),
            verdict_mark(one.manifest.quality.verdict == "pass"),
        )
        for anchor, one in rows
    ]
    return table("All variants, the closest to the base first", heads, cells, numbers=range(2, 7))


def _length(manifest: Manifest) -> str:
    ratio = manifest.quality.length_ratio
    return "not measured" if ratio is None else f"x{ratio:.3f}"


def _comparability(group: Sequence[VariantRecord]) -> Iterator[Markup]:
    texts = {(one.manifest.quality.dataset_sha256, one.manifest.quality.tokens) for one in group}
    if len(texts) > 1:
        told = f"Measured on {len(texts)} different texts: small differences between these variants mean little."
        yield element("p", element("strong", "Mind: "), told)


def _quality_plot(name: str, group: Sequence[VariantRecord]) -> Markup:
    sizes = [one.manifest.bytes / 1e6 for one in group]
    divergences = [max(one.manifest.quality.kl_mean, LEAST_KL) for one in group]
    told = f"{len(group)} variants from {min(sizes):,.0f} to {max(sizes):,.0f} MB, mean divergence from "
    description = f"{told}{min(divergences):.4g} to {max(divergences):.4g} nats a token."
    series = [
        Series(words, tuple(_quality_point(one) for one in group if one.manifest.quality.verdict == verdict), hollow)
        for verdict, words, hollow in (("pass", "passed all limits", False), ("fail", "missed a limit", True))
    ]
    plot = scatter(
        name,
        "Quality against size",
        description,
        linear_axis("size, MB", sizes),
        log_axis("mean KL from the base, nats a token", divergences),
        series,
    )
    caption = "Lower is closer to the base, left is smaller."
    return element("figure", plot, legend(series), element("figcaption", caption))


def _quality_point(one: VariantRecord) -> Point:
    manifest = one.manifest
    hint = f"{manifest.id}: {manifest.bytes / 1e6:,.1f} MB, KL {manifest.quality.kl_mean:.4g}"
    return Point(manifest.bytes / 1e6, max(manifest.quality.kl_mean, LEAST_KL), hint, manifest.scheme.name)
