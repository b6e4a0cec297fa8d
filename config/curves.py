"""Measurements of several directories -> the lines of a plot: latency against throughput, machine by machine; pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from config.capacity import Capacity, Load, Measurement, Percentiles


@dataclass(frozen=True, slots=True)
class Stop:
    """One concurrency on a line: all tokens a second, and how long a caller waits for the first and the next one."""

    concurrency: int
    tokens_per_second: float
    first_token: Percentiles
    next_token: Percentiles


@dataclass(frozen=True, slots=True)
class Curve:
    """One variant on one machine."""

    name: str
    stops: tuple[Stop, ...]


def curves_by_machine(capacities: Mapping[str, Capacity]) -> dict[str, tuple[Curve, ...]]:
    """Sort what was measured by machine, in the order of the variants; machines in the order of their names."""
    found: dict[str, list[Curve]] = {}
    for name, capacity in capacities.items():
        for machine, measured in capacity.by_machine().items():
            if stops := _stops(measured):
                found.setdefault(machine, []).append(Curve(name, stops))
    return {machine: tuple(found[machine]) for machine in sorted(found)}


def _stops(measured: Measurement) -> tuple[Stop, ...]:
    return tuple(stop for stop in map(_stop, measured.loads) if stop)


def _stop(load: Load) -> Stop | None:
    first, following = load.time_to_first_token_seconds, load.inter_token_seconds
    if first is None or following is None:
        return None
    return Stop(load.concurrency, load.output_tokens_per_second, first, following)


def mixes(capacities: Sequence[Capacity]) -> set[tuple[str, ...]]:
    """The different mixes of requests that were measured with; more than one can't be compared."""
    newest = (one for capacity in capacities for one in capacity.by_machine().values())
    return {tuple(map(str, one.mix)) for one in newest}
