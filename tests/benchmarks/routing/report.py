"""What the benchmark found, as Markdown and as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from config.capacity import Measurement
from tests.benchmarks.overhead.report import table
from tests.benchmarks.routing.deciding import PROMPTS, Cost
from tests.benchmarks.routing.figures import Figures, Objective
from tests.benchmarks.routing.fleet import FleetFigures
from tests.benchmarks.routing.sockets import Lateness

METHOD = """\
Every policy meets the same turns on the same engines. Load is in multiples of what the best rung takes: the highest
Poisson rate of turns at which 95 % of first tokens come in time. Good: an answer that meets the objective, as a share
of all turns and a rate; in time: its first token came in time. Agreement: mean top1_agreement of the variants that
answered. Waits count from first asking. Changed turns: answered in another precision than the conversation's turn
before, as a share of all that had one. Changes: of the rung that takes most turns, in windows of 5 s; gates: opened
or closed.
Retry error: what Retry-After told less the time until the turn would have been taken, median / p95 of its size."""


@dataclass(slots=True)
class Report:
    """Everything that was found; tables by their titles."""

    machine: str
    fleet: str
    objective: Objective
    capacity: float
    tables: dict[str, list[Figures]] = field(default_factory=dict)
    measurements: dict[str, Measurement] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    spreads: dict[str, float] = field(default_factory=dict)
    decisions: list[Cost] = field(default_factory=list)
    late: dict[str, Lateness] = field(default_factory=dict)
    fleets: list[FleetFigures] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Every figure; what there was none of is null."""
        told = {title: [_plain(asdict(figures)) for figures in found] for title, found in self.tables.items()}
        curves = {name: one.model_dump(mode="json") for name, one in self.measurements.items()}
        return {
            "machine": self.machine,
            "fleet": self.fleet,
            "objective": asdict(self.objective),
            "capacity_turns_per_second": self.capacity,
            "tables": told,
            "capacity": curves,
            "burst_spread": self.spreads,
            "decision_microseconds": [asdict(each) for each in self.decisions],
            "fleets": [asdict(each) for each in self.fleets],
            "late": {name: asdict(late) for name, late in self.late.items()},
        }

    def markdown(self) -> str:
        """Write the tables, machine and method first."""
        said = (
            f"{self.machine}; fleet: {self.fleet}; its best rung takes {self.capacity:.2f} turns/s; "
            f"objective: first token within {self.objective.first_token_seconds:g} s, then "
            f"{self.objective.inter_token_seconds:g} s a token"
        )
        parts = [said, METHOD, *self.notes]
        if self.measurements:
            parts.append(_curves(self.measurements))
        parts += [f"### {title}\n\n{_figures(found)}" for title, found in self.tables.items()]
        if self.spreads:
            rows = [[name, f"{spread:.2f}"] for name, spread in self.spreads.items()]
            parts.append("### 64 equal turns within 0.25 s\n\n" + table(["policy", "max/mean"], rows))
        if self.decisions:
            costs = [[each.fleet, *(f"{one:.1f}" for one in each.prompts)] for each in self.decisions]
            parts.append("### A decision and its end, in microseconds\n\n" + table(["fleet", *PROMPTS], costs))
        if self.fleets:
            parts.append("### A large fleet behind many gateways\n\n" + fleet_table(self.fleets))
        if self.late:
            late = [
                [name, f"{1000 * each.clients:.1f}", f"{1000 * each.engines:.1f}"] for name, each in self.late.items()
            ]
            parts.append("How late they were, p99 in ms:\n\n" + table(["run", "clients", "engines"], late))
        return "\n\n".join(parts)


def fleet_table(found: Sequence[FleetFigures]) -> str:
    """Write the figures of large fleets, one column each."""
    rows = [
        ["replicas / aliases / gateways", *(f"{len(each.size.fleet.members)} / {each.size.aliases} / "
         f"{each.size.gateways}" for each in found)],
        ["turns/s", *(f"{each.size.turns_per_second:g}" for each in found)],
        ["good", *(f"{100 * each.figures.good_share:.1f} %" for each in found)],
        ["prefix hits", *(f"{100 * each.figures.hit_share:.0f} %" for each in found)],
        ["decision p50 / p99, us", *(f"{each.decision_p50:.0f} / {each.decision_p99:.0f}" for each in found)],
        ["polls/s of a gateway", *(f"{each.polls_per_second_of_gateway:.0f}" for each in found)],
        ["polls/s of a replica", *(f"{each.polls_per_second_of_replica:.1f}" for each in found)],
        ["state database, queries/s", *(f"{each.queries_per_second:.0f}" for each in found)],
        ["memory of a gateway at rest / full, MB", *(f"{each.memory_at_rest_bytes / 1e6:.1f} / "
         f"{each.memory_full_bytes / 1e6:.0f}" for each in found)],
        ["a replica changes state, ms", *(f"{1000 * each.change_seconds:.1f}" for each in found)],
        ["all replicas do, in one snapshot, ms", *(f"{1000 * each.restart_seconds:.1f}" for each in found)],
        ["spread in a rung, median", *(f"{each.spread:.2f}" for each in found)],
    ]  # fmt: skip
    return table(["", *(f"fleet {number}" for number in range(1, len(found) + 1))], rows)


def _figures(found: Sequence[Figures]) -> str:
    rungs = list(found[0].shares)
    told_refusals = any(each.refused for each in found)
    told_floors = any(each.below_floor for each in found)
    head = ["policy", "good", "in time", "good/s", "agreement", *rungs, "TTFT p50", "p95", "p99", "changed turns"]
    head += ["switches/session", "changes/min", "gates/min", "spread", "prefix hits", "turns", "not answered"]
    head += ["429", "retry error"] if told_refusals else []
    head += ["below floor"] if told_floors else []
    rows = []
    for each in found:
        row = [
            each.policy,
            f"{100 * each.good_share:.1f} %",
            f"{100 * each.in_time_share:.1f} %",
            f"{each.good_per_second:.2f}",
            f"{each.agreement:.4f}",
            *(f"{100 * each.shares[rung]:.0f} %" for rung in rungs),
            *(f"{value:.2f}" for value in (each.first_token_p50, each.first_token_p95, each.first_token_p99)),
            f"{100 * each.changed_share:.1f} %",
            f"{each.session_switches:.2f}",
            f"{each.window_switches:.1f}",
            f"{each.alias_switches:.1f}",
            f"{each.spread:.2f}",
            f"{100 * each.hit_share:.0f} %",
            str(each.turns),
            str(each.turns - each.answered),
        ]
        row += [str(each.refused), _error(each)] if told_refusals else []
        row += [str(each.below_floor)] if told_floors else []
        rows.append(row)
    return table(head, rows)


def _error(figures: Figures) -> str:
    if math.isnan(figures.retry_error_seconds):
        return ""
    return f"{figures.retry_error_seconds:+.1f} / {figures.retry_error_p95_seconds:.1f} s"


def _curves(measurements: Mapping[str, Measurement]) -> str:
    rows = []
    for name, one in measurements.items():
        for load in one.loads:
            first = load.time_to_first_token_seconds
            rows.append(
                [
                    name,
                    str(load.concurrency),
                    f"{load.prefill_tokens_per_second:,.0f}",
                    f"{load.decode_tokens_per_second:.1f}",
                    f"{load.output_tokens_per_second:,.0f}",
                    f"{first.p95:.2f}" if first else "",
                ]
            )
    head = ["precision", "concurrency", "prompt tokens/s of one", "answer tokens/s of one", "of all", "TTFT p95"]
    return "### The engines, measured in closed loops\n\n" + table(head, rows)


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in figures.items()}
