"""How requests are routed, beside other policies: `python -m tests.benchmarks.routing [--parts NAMES] [--json FILE]`.

Engines, load and time are simulated; a run says the same on any machine, and the machine line only how it was made.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from config.capacity import Measurement
from config.schema import Spill
from gateway.routing.target import DEFAULT_SPILL
from tests.benchmarks.machine import machine_line
from tests.benchmarks.overhead.processes import ROOT, NotThere
from tests.benchmarks.routing import policies, scenarios
from tests.benchmarks.routing.calibration import measured
from tests.benchmarks.routing.deciding import decision_costs
from tests.benchmarks.routing.engine_server import counts_of
from tests.benchmarks.routing.figures import Objective, figures_of
from tests.benchmarks.routing.fleet import Size, fleet_figures
from tests.benchmarks.routing.ours import Options, Ours
from tests.benchmarks.routing.policy import Policy
from tests.benchmarks.routing.profiles import MODELS, QUALITY, Fleet, fleet_of
from tests.benchmarks.routing.report import Report
from tests.benchmarks.routing.runs import Run, Scenario
from tests.benchmarks.routing.scenarios import Ground
from tests.benchmarks.routing.several import BESIDE_SECONDS, BESIDE_TIMES, beside_fleet, beside_one
from tests.benchmarks.routing.simulation import simulate
from tests.benchmarks.routing.sockets import Setting, contenders, run_over_sockets
from tests.benchmarks.routing.workloads import CHATS, Mix

PARTS = ("capacity", "steady", "square", "ramp", "faults", "overload", "burst")
SOCKETS = "sockets"
DECISION = "decision"
GATEWAYS, FLEET = "gateways", "fleet"
OVERLOAD = 6.0
PEERS_FOLDER = ROOT / ".venv" / "peers"
PLOTTED = ("least in flight", "static ladder")

Measured = Mapping[str, Measurement]
Maker = Callable[[Fleet, int, Measured], Policy]


def _static_ladder(fleet: Fleet, seed: int, measurements: Measured, objective: Objective) -> Policy:
    """As well set as it can be: for each rung, the most requests at which first tokens came in time when measured."""
    slots = {
        precision: max(
            load.concurrency
            for load in one.loads
            if load.time_to_first_token_seconds
            and load.time_to_first_token_seconds.p95 <= objective.first_token_seconds
        )
        for precision, one in measurements.items()
    }
    return policies.StaticLadder(fleet, seed, slots=slots)


def _makers(objective: Objective, options: Options) -> dict[str, Maker]:
    plain = (
        policies.RoundRobin,
        policies.Random,
        policies.LeastInFlight,
        policies.PowerOfTwo,
        policies.CacheAware,
        policies.LeastLoad,
    )
    makers: dict[str, Maker] = {Ours.name: lambda fleet, _, measurements: Ours(fleet, measurements, options)}
    makers |= {kind.name: partial(_made, kind) for kind in plain}
    makers[policies.StaticLadder.name] = partial(_static_ladder, objective=objective)
    return makers


def _made(kind: Callable[[Fleet, int], Policy], fleet: Fleet, seed: int, _: Measured) -> Policy:
    return kind(fleet, seed)


def main(arguments: Sequence[str]) -> int:
    """Simulate, and print Markdown."""
    options = _options(arguments)
    objective = Objective(options.objective, options.inter_token)
    fleet = fleet_of(options.model, options.fleet).with_cache(*options.cache)
    measurements = {rung: measured(fleet.only(rung).members[0].profile) for rung in fleet.rungs}
    capacity = options.capacity or scenarios.best_rung_capacity(fleet, objective)
    report = Report(machine_line(), f"{options.model}, {fleet}", objective, capacity)
    makers = {name: maker for name, maker in _makers(objective, _ours(options)).items() if name in options.policies}
    bench = Bench(
        Ground(fleet, capacity, options.seconds, _mix(options)),
        objective,
        makers,
        measurements,
        options.seeds,
        options.loads,
    )
    if "capacity" in options.parts:
        report.measurements = measurements
    bench.fill(report, options.parts)
    if DECISION in options.parts:
        report.decisions = decision_costs()
    if GATEWAYS in options.parts:
        ground = Ground(beside_fleet(options.model), BESIDE_TIMES * capacity, BESIDE_SECONDS, _mix(options))
        report.tables |= beside_one(ground, measurements, objective)
    if FLEET in options.parts:
        report.fleets = [fleet_figures(size, objective) for size in (Size(aliases=10, turns_per_second=500.0), Size())]
    if SOCKETS in options.parts:
        setting = Setting(options.model, fleet, measurements, _ours(options), options.peers_folder)
        _compare_over_sockets(report, setting, options, objective)
    if options.plots and "ramp" in options.parts:
        report.notes.append(bench.plot(options.plots))
    print(report.markdown())
    if options.json:
        options.json.write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
    return 0


class Bench:
    """Runs scenarios with every policy."""

    def __init__(
        self,
        ground: Ground,
        objective: Objective,
        makers: Mapping[str, Maker],
        measurements: Measured,
        seeds: int,
        loads: Sequence[float],
    ) -> None:
        self.ground, self.objective = ground, objective
        self.makers, self.measurements = makers, measurements
        self.seeds, self.loads = seeds, loads

    def fill(self, report: Report, parts: Sequence[str]) -> None:
        """Run the parts that are asked for."""
        ground = self.ground
        if "steady" in parts:
            for times in self.loads:
                self._compare(report, f"{times:g} times the best rung", partial(scenarios.steady, ground, times))
        if "square" in parts:
            self._compare(report, "Square wave, 0.5 and 1.5 times, 60 s", partial(scenarios.wave, ground))
        if "ramp" in parts:
            self._compare(report, "Ramp, 0.33 to 2 times and back", partial(scenarios.hill, ground))
        if "faults" in parts:
            for name in scenarios.FAULTS:
                title = f"Fault at {scenarios.FAULT_LOAD:g} times: {name}"
                self._compare(report, title, partial(scenarios.faulty, ground, name))
        if "overload" in parts:
            title = f"More than all rungs take: {OVERLOAD:g} times"
            self._compare(report, title, partial(scenarios.steady, ground, OVERLOAD))
        if "burst" in parts:
            scenario = scenarios.burst(ground.fleet)
            for name in self.makers:
                run = self._run(name, scenario)
                report.spreads[name] = figures_of(run, self.objective).spread

    def plot(self, folder: Path) -> str:
        """Draw the ramp; returns a line that says where, or why not."""
        if find_spec("matplotlib") is None:
            return "No plot: matplotlib is not installed (quantgate[plots])."
        from tests.benchmarks.routing.plots import write_ramp  # noqa: PLC0415 - an extra

        names = [name for name in self.makers if name == Ours.name or name in PLOTTED]
        scenario = scenarios.hill(self.ground, 1)
        runs = [self._run(name, scenario) for name in names]
        folder.mkdir(parents=True, exist_ok=True)
        out = folder / "routing-ramp.png"
        write_ramp(runs, scenarios.ramp_rate(self.ground), self.ground.capacity, self.objective, out)
        return f"![Ramp: load, precisions, time to first token]({out.name})"

    def _compare(self, report: Report, title: str, scenario_of: Callable[[int], Scenario]) -> None:
        print(title, file=sys.stderr)
        drawn = [scenario_of(seed + 1) for seed in range(self.seeds)]
        report.tables[title] = [
            scenarios.mean_of([figures_of(self._run(name, scenario), self.objective) for scenario in drawn])
            for name in self.makers
        ]

    def _run(self, name: str, scenario: Scenario) -> Run:
        return simulate(scenario, lambda it: self.makers[name](it.fleet, it.seed, self.measurements))


def _compare_over_sockets(report: Report, setting: Setting, options: argparse.Namespace, objective: Objective) -> None:
    """Run everybody in real time, which takes as long as it says."""
    ground = Ground(setting.fleet, report.capacity, options.socket_seconds, _mix(options))
    for times in options.socket_loads:
        title = f"Over sockets, in real time: {times:g} times the best rung"
        found, scenario = [], scenarios.steady(ground, times, 1)
        for name in options.socket_policies:
            print(f"{title}: {name}", file=sys.stderr)
            try:
                run, late = run_over_sockets(name, setting, scenario)
            except NotThere as why:
                report.notes.append(f"{name}: skipped, {why}")
                continue
            found.append(figures_of(run, objective))
            report.late[f"{name}, {times:g} times"] = late
        if found:
            report.tables[title] = found


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.routing", description=__doc__)
    known = tuple(_makers(Objective(), Options()))
    parts = (*PARTS, DECISION, GATEWAYS, FLEET, SOCKETS)
    parser.add_argument("--parts", type=_words(parts), default=list(PARTS), help=f"of {','.join(parts)}")
    parser.add_argument("--policies", type=_words(known), default=list(known), help=f"of {','.join(known)}")
    parser.add_argument("--model", choices=list(MODELS), default="32b", help="(default: %(default)s)")
    parser.add_argument("--fleet", type=_counts, default="bf16=2,int8=1,int4=1", help="(default: %(default)s)")
    parser.add_argument(
        "--cache",
        type=_factors,
        default=(1.0, 1.0),
        metavar="CAPACITY,READING",
        help="times the tokens that the KV cache holds, and times the seconds to read one; FP8: 2,0.5",
    )
    parser.add_argument("--objective", type=float, default=2.0, help="seconds to the first token (%(default)s)")
    parser.add_argument("--inter-token", type=float, default=0.1, help="seconds from token to token (%(default)s)")
    parser.add_argument("--spill-after", type=float, default=DEFAULT_SPILL.after_seconds, help="(%(default)s)")
    parser.add_argument("--return-below", type=float, default=DEFAULT_SPILL.return_below_seconds, help="(%(default)s)")
    parser.add_argument("--dwell", type=float, default=DEFAULT_SPILL.dwell_seconds, help="(%(default)s)")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds a request may wait (%(default)s)")
    parser.add_argument("--unmeasured", action="store_true", help="give our gateway no capacity.json")
    parser.add_argument("--unnamed", action="store_true", help="clients do not name their conversations")
    parser.add_argument("--mean-turns", type=float, default=CHATS.mean_turns, help="of a conversation (%(default)s)")
    parser.add_argument("--think", type=float, default=CHATS.think_seconds, help="mean seconds to read (%(default)s)")
    parser.add_argument("--loads", type=_numbers, default=list(scenarios.STEADY), help="times the best rung")
    parser.add_argument("--capacity", type=float, help="turns/s of the best rung; not given: searched for")
    parser.add_argument("--seconds", type=float, default=600.0, help="of each scenario (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="workloads of each scenario (default: %(default)s)")
    parser.add_argument("--socket-seconds", type=float, default=120.0, help="of each run (default: %(default)s)")
    parser.add_argument("--socket-loads", type=_numbers, default=[1.25], help="times the best rung (1.25)")
    parser.add_argument("--socket-policies", type=_words(contenders()), default=contenders())
    parser.add_argument("--peers-folder", type=Path, default=PEERS_FOLDER, help="where peers are, or are installed")
    parser.add_argument("--plots", type=Path, help="write pictures into this folder")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    return parser.parse_args(arguments)


def _ours(options: argparse.Namespace) -> Options:
    spill = Spill(
        after_seconds=options.spill_after,
        return_below_seconds=options.return_below,
        dwell_seconds=options.dwell,
    )
    return Options(spill, options.patience, not options.unmeasured, not options.unnamed)


def _mix(options: argparse.Namespace) -> Mix:
    return replace(CHATS, mean_turns=options.mean_turns, think_seconds=options.think)


def _words(known: Sequence[str]) -> Callable[[str], list[str]]:
    def words(text: str) -> list[str]:
        given = [word for word in text.split(",") if word]
        if unknown := sorted(set(given) - set(known)):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return given

    return words


def _factors(text: str) -> tuple[float, float]:
    capacity, reading = _numbers(text)
    return capacity, reading


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _counts(text: str) -> dict[str, int]:
    try:
        counts = counts_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: write for example bf16=2,int4=1") from error
    if unknown := sorted(set(counts) - set(QUALITY)):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(QUALITY)}")
    return counts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
