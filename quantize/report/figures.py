"""Figures of the HTML report: a chart, its legend and the table of its values."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from config.capacity import Capacity, Percentiles
from config.curves import Curve, LoadPoint, curves_by_machine
from quantize.report.charts import (
    Axis,
    Chart,
    Histogram,
    LegendEntry,
    Point,
    Series,
    chart_svg,
    histogram_svg,
    legend,
    tick_text,
)
from quantize.report.tables import Table
from quantize.report.variant_record import KlHistogram, ModuleResult, VariantRecord

# Shown for a KL divergence of 0, which a logarithmic axis has not.
LEAST_KL = 1e-6
KL_AXIS = Axis("mean KL divergence from the base, nats per token", log=True)
_MILLISECONDS = 1e3
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawn chart for the page; `table` has its values, unless another table of the page does."""

    svg: Markup
    caption: str
    legend: tuple[LegendEntry, ...] = ()
    table: Table | None = None


def quality_figure(name: str, records: Sequence[VariantRecord]) -> Figure:
    """Quality against size; the table of all variants has the values."""
    series = tuple(
        Series(
            words,
            tuple(_quality_point(record) for record in records if record.manifest.quality.verdict == verdict),
            hollow=verdict == "fail",
        )
        for verdict, words in (
            ("pass", "passed all limits"),
            ("not shown", "too little text to decide a limit"),
            ("fail", "missed a limit"),
        )
    )
    description = f"Mean KL divergence of {len(records)} variants against their size in MB."
    chart = Chart("Quality against size", description, Axis("size, MB"), KL_AXIS, series)
    return Figure(chart_svg(name, chart), "Lower is closer to the base, left is smaller.", legend(chart))


def speed_figures(name: str, records: Sequence[VariantRecord]) -> Iterator[Figure]:
    """Quality against speed, for each machine with a measurement."""
    for number, machine in enumerate(sorted({machine for one in records for machine in one.decode_tokens_per_second})):
        measured = [record for record in records if machine in record.decode_tokens_per_second]
        points = tuple(
            Point(record.decode_tokens_per_second[machine], _kl(record), record.manifest.scheme.name)
            for record in measured
        )
        chart = Chart(
            f"Quality against speed on {machine}",
            f"Mean KL divergence of {len(points)} variants against tokens per second.",
            Axis("output of one request, tokens/s", zero=True),
            KL_AXIS,
            (Series(machine, points),),
        )
        rows = tuple(
            (record.manifest.id, f"{point.x:.1f}", f"{record.manifest.quality.kl_mean:.4g}")
            for record, point in zip(measured, points, strict=True)
        )
        yield Figure(
            chart_svg(f"{name}-{number}", chart),
            f"On {machine}, at the lowest measured concurrency. Lower is closer to the base, right is faster.",
            table=Table("Values", ("variant", "tokens/s", "mean KL"), rows),
        )


def latency_figures(name: str, records: Sequence[VariantRecord], base: Capacity | None) -> Iterator[Figure]:
    """Latency against throughput for each machine: a line per variant, and one for the base if it was measured."""
    capacities = {"base": base} if base else {}
    capacities |= {record.manifest.id: record.capacity for record in records}
    for number, (machine, curves) in enumerate(curves_by_machine(capacities).items()):
        first = Axis("time to first token, median, ms", log=True)
        following = Axis("inter-token latency, median, ms", zero=True)
        yield _latency(f"{name}-first-{number}", machine, curves, first, lambda load: load.first_token)
        yield _latency(f"{name}-next-{number}", machine, curves, following, lambda load: load.next_token)


def loss_figure(name: str, modules: Sequence[ModuleResult]) -> Figure | None:
    """The largest loss of each layer, by kind of module; None without losses."""
    kinds: dict[str, list[tuple[int, ModuleResult, float]]] = {}
    for module in modules:
        layer = _LAYER.search(module.module)
        if layer and module.loss:
            kind = module.module.rpartition(".")[2]
            kinds.setdefault(kind, []).append((int(layer[1]), module, module.loss))
    if not kinds:
        return None
    series = tuple(Series(kind, _largest_by_layer(found)) for kind, found in kinds.items())
    layers = len({point.x for one in series for point in one.points})
    count = sum(map(len, kinds.values()))
    description = f"{count} modules of {len(series)} kinds in {layers} layers."
    chart = Chart("Loss by layer", description, Axis("layer"), Axis("GPTQ loss", log=True), series, kind="lines")
    fallback = [module.module for module in modules if module.fallback]
    rounded = f" Rounded to nearest (RTN) instead: {', '.join(fallback)}." if fallback else ""
    caption = f"GPTQ loss by kind of module; the largest of a layer.{rounded}"
    return Figure(chart_svg(name, chart), caption, legend(chart), _loss_table(kinds))


def histogram_figure(name: str, histogram: KlHistogram | None) -> Figure | None:
    """The distribution of KL divergences over tokens; None if it was not recorded."""
    if histogram is None or not histogram.counts:
        return None
    tokens = sum(histogram.counts)
    chart = Histogram(
        "KL divergence per token",
        f"Distribution of {tokens:,} tokens by their KL divergence.",
        "KL divergence from the base, nats",
        histogram.edges,
        histogram.counts,
    )
    bins = zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
    rows = tuple(
        (f"{tick_text(low)} to {tick_text(high)}", f"{count:,}", f"{count / max(tokens, 1):.2%}")
        for low, high, count in bins
        if count
    )
    caption = f"{tokens:,} held-out tokens by KL divergence. The first column holds all below the first mark."
    return Figure(histogram_svg(name, chart), caption, table=Table("Values", ("KL, nats", "tokens", "share"), rows))


def _kl(record: VariantRecord) -> float:
    return max(record.manifest.quality.kl_mean, LEAST_KL)


def _quality_point(record: VariantRecord) -> Point:
    return Point(record.manifest.bytes / 1e6, _kl(record), record.manifest.scheme.name)


def _latency(
    name: str, machine: str, curves: Sequence[Curve], axis: Axis, latency: Callable[[LoadPoint], Percentiles]
) -> Figure:
    series = tuple(
        Series(curve.name, tuple(_latency_point(load, latency(load)) for load in curve.points)) for curve in curves
    )
    title = f"{axis.label.partition(',')[0].capitalize()} against throughput on {machine}"
    description = f"Median latency of {len(curves)} models at {sum(len(curve.points) for curve in curves)} loads."
    throughput = Axis("output of all requests, tokens/s", zero=True)
    chart = Chart(title, description, throughput, axis, series, kind="lines")
    rows = tuple(
        (
            curve.name,
            str(load.concurrency),
            f"{load.tokens_per_second:.1f}",
            f"{latency(load).p50 * _MILLISECONDS:.1f}",
            f"{latency(load).p95 * _MILLISECONDS:.1f}",
        )
        for curve in curves
        for load in curve.points
    )
    return Figure(
        chart_svg(name, chart),
        f"On {machine}; labels are concurrent requests. Lower answers sooner, right serves more.",
        legend(chart),
        Table("Values", ("model", "concurrent requests", "tokens/s", "median, ms", "p95, ms"), rows),
    )


def _latency_point(load: LoadPoint, latency: Percentiles) -> Point:
    return Point(load.tokens_per_second, latency.p50 * _MILLISECONDS, str(load.concurrency))


def _largest_by_layer(found: Sequence[tuple[int, ModuleResult, float]]) -> tuple[Point, ...]:
    largest: dict[int, float] = {}
    for layer, _, loss in found:
        largest[layer] = max(loss, largest.get(layer, 0.0))
    return tuple(Point(layer, largest[layer]) for layer in sorted(largest))


def _loss_table(kinds: dict[str, list[tuple[int, ModuleResult, float]]]) -> Table:
    rows = []
    for kind, found in kinds.items():
        _, worst, loss = max(found, key=lambda entry: entry[2])
        mean = sum(entry[2] for entry in found) / len(found)
        rows.append((kind, str(len(found)), f"{mean:.4g}", f"{loss:.4g}", worst.module, f"{worst.bits}, {worst.damp}"))
    headings = ("kind", "modules", "mean loss", "largest loss", "of module", "its bits, damping")
    return Table("Values", headings, tuple(rows))
