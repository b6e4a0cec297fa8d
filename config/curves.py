"""Convert measurements of several model directories to the curves of a latency-throughput plot, by machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from config.capacity import Capacity, Load, Measurement, Percentiles


@dataclass(frozen=True, slots=True)
class Stop:
    """A point of a curve: total throughput, time to first token and inter-token latency at one concurrency."""

    concurrency: int
    tokens_per_second: float
    first_token: Percentiles
    next_token: Percentiles


@dataclass(frozen=True, slots=True)
class Curve:
    """The points of one variant on one machine, concurrencies ascending."""

    name: str
    stops: tuple[Stop, ...]


def curves_by_machine(capacities: Mapping[str, Capacity]) -> dict[str, tuple[Curve, ...]]:
    """Group curves by machine, sorted by its name; within a machine in the order of `capacities`.

    `capacities` are by variant name. A measurement without latencies has no curve.
    """
    curves: dict[str, list[Curve]] = {}
    for name, capacity in capacities.items():
        for machine, measured in capacity.by_machine().items():
            if stops := _stops(measured):
                curves.setdefault(machine, []).append(Curve(name, stops))
    return {machine: tuple(curves[machine]) for machine in sorted(curves)}


def _stops(measured: Measurement) -> tuple[Stop, ...]:
    return tuple(stop for stop in map(_stop, measured.loads) if stop)


def _stop(load: Load) -> Stop | None:
    first, following = load.time_to_first_token_seconds, load.inter_token_seconds
    if first is None or following is None:
        return None
    return Stop(load.concurrency, load.output_tokens_per_second, first, following)


def mixes(capacities: Sequence[Capacity]) -> set[tuple[str, ...]]:
    """Return the distinct request mixes of the newest measurements; results of different mixes are not comparable."""
    newest = (measurement for capacity in capacities for measurement in capacity.by_machine().values())
    return {tuple(map(str, measurement.mix)) for measurement in newest}
