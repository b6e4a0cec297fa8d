"""What `quantgate measure` found out, as a part of the HTML page: quality against speed, latency against throughput."""

from collections.abc import Callable, Iterator, Sequence

from config.capacity import Capacity, Percentiles
from config.curves import Curve, Stop, curves_by_machine, mixes
from quantize.report.markup import Markup, element
from quantize.report.plots import Axis, Point, Series, legend, linear_axis, lines, log_axis, scatter
from quantize.report.variant_record import VariantRecord

# The divergence that a logarithmic axis shows for none at all.
LEAST_KL = 1e-6
_MILLISECONDS = 1e3


def speed_plots(name: str, group: Sequence[VariantRecord]) -> Iterator[Markup]:
    """Plot quality against speed, machine by machine."""
    machines = sorted({machine for one in group for machine in one.speeds})
    if not machines:
        yield element(
            "p", "No speeds: no variant has a capacity.json, which `quantgate measure` writes.", class_="quiet"
        )
    for number, machine in enumerate(machines):
        measured = [one for one in group if machine in one.speeds]
        points = tuple(_speed_point(one, machine) for one in measured)
        plot = scatter(
            f"{name}-{number}",
            f"Quality against speed on {machine}",
            f"{len(points)} variants, measured at their least load.",
            linear_axis("decoding of one request, tokens/s", [point.x for point in points], from_zero=True),
            log_axis("mean KL from the base, nats a token", [point.y for point in points]),
            [Series(machine, points)],
        )
        caption = f"On {machine}, at the least load measured. Lower is closer to the base, right is faster."
        yield element("figure", plot, element("figcaption", caption))


def _speed_point(one: VariantRecord, machine: str) -> Point:
    speed, divergence = one.speeds[machine], max(one.manifest.quality.kl_mean, LEAST_KL)
    return Point(speed, divergence, f"{one.manifest.id}: {speed:.1f} tokens/s", one.manifest.scheme.name)


def latency_plots(name: str, group: Sequence[VariantRecord], parent: Capacity | None) -> Iterator[Markup]:
    """Plot latency against throughput, machine by machine: a line for each variant, and for the base if it is known."""
    capacities = {"base": parent} if parent else {}
    capacities |= {record.manifest.id: record.capacity for record in group}
    for number, (machine, curves) in enumerate(curves_by_machine(capacities).items()):
        yield _latency_figure(
            f"{name}-first-{number}", "Time to first token", machine, curves, lambda stop: stop.first_token, log_axis
        )
        yield _latency_figure(
            f"{name}-next-{number}",
            "Time from token to token",
            machine,
            curves,
            lambda stop: stop.next_token,
            _from_zero,
        )
    if len(mixes(list(capacities.values()))) > 1:
        told = "Measured with different mixes of requests: these lines are no fair comparison."
        yield element("p", element("strong", "Mind: "), told)


def _latency_figure(
    name: str,
    title: str,
    machine: str,
    curves: Sequence[Curve],
    latency: Callable[[Stop], Percentiles],
    axis: Callable[[str, Sequence[float]], Axis],
) -> Markup:
    series = [Series(one.name, tuple(_stop_point(one, stop, latency(stop)) for stop in one.stops)) for one in curves]
    points = [point for one in series for point in one.points]
    plot = lines(
        name,
        f"{title} against throughput on {machine}",
        f"{len(series)} models at {len(points)} loads altogether.",
        linear_axis("answers of all requests together, tokens/s", [point.x for point in points], from_zero=True),
        axis(f"{title[0].lower()}{title[1:]}, median, ms", [point.y for point in points]),
        series,
    )
    caption = f"On {machine}; numbers say how many requests ran at a time. Lower answers sooner, right serves more."
    return element("figure", plot, legend(series), element("figcaption", caption))


def _stop_point(curve: Curve, stop: Stop, latency: Percentiles) -> Point:
    median, rare = latency.p50 * _MILLISECONDS, latency.p95 * _MILLISECONDS
    told = f"{stop.tokens_per_second:.1f} tokens/s, median {median:.1f} ms, 95th percentile {rare:.1f} ms"
    hint = f"{curve.name}, {stop.concurrency} at a time: {told}"
    return Point(stop.tokens_per_second, median, hint, str(stop.concurrency))


def _from_zero(label: str, values: Sequence[float]) -> Axis:
    return linear_axis(label, values, from_zero=True)
