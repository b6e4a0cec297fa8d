"""Convert measurements of several model directories to the curves of a latency-throughput plot, by machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from config.capacity import Capacity, Load, Measurement, Percentiles


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """A point of a curve: total throughput, time to first token and inter-token latency at one concurrency."""

    concurrency: int
    tokens_per_second: float
    first_token: Percentiles
    next_token: Percentiles


@dataclass(frozen=True, slots=True)
class Curve:
    """The points of one variant on one machine, concurrencies ascending."""

    name: str
    points: tuple[LoadPoint, ...]


def curves_by_machine(capacities: Mapping[str, Capacity]) -> dict[str, tuple[Curve, ...]]:
    """Group curves by machine, sorted by its name; within a machine in the order of `capacities`.

    `capacities` are by variant name. A measurement without latencies has no curve.
    """
    curves: dict[str, list[Curve]] = {}
    for name, capacity in capacities.items():
        for machine, measured in capacity.by_machine().items():
            if points := _load_points(measured):
                curves.setdefault(machine, []).append(Curve(name, points))
    return {machine: tuple(curves[machine]) for machine in sorted(curves)}


def _load_points(measured: Measurement) -> tuple[LoadPoint, ...]:
    return tuple(point for point in map(_load_point, measured.loads) if point)


def _load_point(load: Load) -> LoadPoint | None:
    first, following = load.time_to_first_token_seconds, load.inter_token_seconds
    if first is None or following is None:
        return None
    return LoadPoint(load.concurrency, load.output_tokens_per_second, first, following)


def mixes(capacities: Sequence[Capacity]) -> set[tuple[str, ...]]:
    """Return the distinct request mixes of the newest measurements; results of different mixes are not comparable."""
    newest = (measurement for capacity in capacities for measurement in capacity.by_machine().values())
    return {tuple(map(str, measurement.mix)) for measurement in newest}
