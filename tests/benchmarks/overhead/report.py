"""What the benchmark found, as Markdown and as JSON."""

import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.benchmarks.overhead.figures import Added, Cost, ratios
from tests.benchmarks.overhead.loads import PLAIN
from tests.benchmarks.overhead.parts import LatencyFound, LongBody, Rest, Scaled

YARDSTICK = "vllm-router"

METHOD = """\
One upstream on eight addresses; every gateway routes over all eight, ours with keys, a ladder, access log and metrics.
32 connections; every contender in turn, round by round; medians of the rounds, ratios taken within a round.
CPU is time on a core, to the nanosecond, of all threads of a gateway's processes (`schedstat`); idle work included.
Latency: plain requests asked directly and through the gateway in turn, at a fixed rate far below saturation;
a streamed chunk says when it left, on a clock that all processes share."""


@dataclass(slots=True)
class Report:
    """Everything that was measured; what is empty was not asked for."""

    machine: str
    versions: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    latencies: list[LatencyFound] = field(default_factory=list)
    soak: list[Rest] = field(default_factory=list)
    long_body: LongBody | None = None
    starts_seconds: list[float] = field(default_factory=list)
    scaling: list[Scaled] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Everything, round by round."""
        return asdict(self)

    def markdown(self) -> str:
        """Write the tables, machine and method first."""
        parts = [
            f"{self.machine}, Linux {platform.release()}; "
            + ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            METHOD,
            *(f"{name}: skipped, {why}" for name, why in self.skipped.items()),
            _costs(self.costs) if self.costs else "",
            _latencies(self.latencies) if self.latencies else "",
            _soak(self.soak) if self.soak else "",
            _long_body(self.long_body) if self.long_body else "",
            _starts(self.starts_seconds) if self.starts_seconds else "",
            _scaling(self.scaling) if self.scaling else "",
        ]
        return "\n\n".join(part for part in parts if part)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _costs(costs: Sequence[Cost]) -> str:
    against = ratios(costs, YARDSTICK)
    rows = []
    for load, contender in dict.fromkeys((cost.load, cost.contender) for cost in costs):
        own = [cost for cost in costs if (cost.load, cost.contender) == (load, contender)]
        ratio = against.get((contender, load))
        # Where not one answer came in time, there is nothing to tell; ask for longer.
        measured = any(cost.cpu_seconds for cost in own) and all(cost.tally.requests for cost in own)
        rows.append(
            [
                load,
                contender,
                f"{statistics.median(cost.per_request_us for cost in own):.1f}" if measured else "",
                f"{statistics.median(cost.unit_us for cost in own):.2f}" if measured and own[0].chunks else "",
                f"{ratio:.2f}" if ratio else "",
                f"{statistics.median(cost.tally.requests / cost.tally.seconds for cost in own):,.0f}",
                f"{statistics.median(cost.tally.p50_ms for cost in own):.2f}",
                f"{statistics.median(cost.tally.p99_ms for cost in own):.2f}",
                str(sum(cost.tally.bad for cost in own)),
                f"{max(cost.resident_bytes for cost in own) / 1e6:.0f}" if measured else "",
            ]
        )
    head = ["load", "gateway", "us CPU/request", "us CPU/chunk", f"x {YARDSTICK}"]
    return table([*head, "requests/s", "p50 ms", "p99 ms", "bad", "MB"], rows)


def _latencies(found: Sequence[LatencyFound]) -> str:
    rows = []
    for one in found:
        for what, added in ((PLAIN.name, one.plain), ("gap between chunks", one.gap), ("a chunk's way", one.journey)):
            rows.append([one.contender, what, *_added(added)])
    return table(["gateway", "what", "p99 ms directly", "added: p50 ms", "p99 ms", "mean ms"], rows)


def _added(added: Added) -> list[str]:
    mean = f"{added.mean_ms:.3f}" + (f" ± {added.error_ms:.3f}" if added.error_ms is not None else "")
    return [f"{added.direct_p99_ms:.3f}", f"{added.p50_ms:.3f}", f"{added.p99_ms:.3f}", mean]


def _soak(found: Sequence[Rest]) -> str:
    head = ["one worker", "MB before", *(f"{10 * step} %" for step in range(1, len(found[0].megabytes))), "bad"]
    return table(head, [[one.what, *(f"{each:.1f}" for each in one.megabytes), str(one.bad)] for one in found])


def _long_body(found: LongBody) -> str:
    return (
        f"A body of {found.body_bytes / 1e6:.0f} MB: {found.gateway_ms:.1f} ms of CPU; msgspec alone reads its top "
        f"level in {found.top_level_ms:.1f} ms, all of it in {found.whole_ms:.1f} ms."
    )


def _starts(seconds: Sequence[float]) -> str:
    return f"From exec to /livez: {', '.join(f'{each:.2f}' for each in sorted(seconds))} s."


def _scaling(found: Sequence[Scaled]) -> str:
    rows = [
        [
            str(one.workers),
            f"{one.tally.requests / one.tally.seconds:,.0f}",
            f"{one.tally.p50_ms:.2f}",
            f"{one.tally.p99_ms:.2f}",
            str(one.tally.bad),
        ]
        for one in found
    ]
    said = "wrk and the upstream run on the same cores as the workers."
    return f"{table(['workers', 'requests/s', 'p50 ms', 'p99 ms', 'bad'], rows)}\n\n{said}"
