"""What our gateway costs, beside others: `python -m tests.benchmarks.overhead [--seconds N] [--rounds N]`.

Wants `wrk` (`apt install wrk`, or https://github.com/wg/wrk); without it a client of our own asks, which is slower, so
that requests/s and percentiles say more about it than about the gateways; CPU figures stay comparable. Peers are
installed from PyPI at first use, each into an environment of its own; one that can't be had is skipped. Measure on a
machine that does nothing else, with two cores at least.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks.machine import machine_line
from tests.benchmarks.overhead import parts
from tests.benchmarks.overhead.contenders import PEERS, Ours, ours, peer, quantgate, upstream
from tests.benchmarks.overhead.loads import Contender
from tests.benchmarks.overhead.processes import ROOT, NotThere
from tests.benchmarks.overhead.report import Report

PEERS_FOLDER = ROOT / ".venv" / "peers"
PARTS = ("costs", "latency", "soak", "body", "starts", "workers")
WHAT_COUNTS = ("quantgate", "uvloop", "httptools", "msgspec")


def main(arguments: Sequence[str]) -> int:
    """Measure, and print Markdown."""
    options = _options(arguments)
    versions = {"Python": sys.version.split()[0], **{name: version(name) for name in WHAT_COUNTS}}
    report = Report(machine_line(), versions)
    with TemporaryDirectory(prefix="overhead-") as name, upstream(Path(name)) as replicas:
        made = ours(replicas, Path(name))
        if "starts" in options.parts:
            report.starts_seconds = parts.starts(made)
        _beside_peers(options, report, replicas, made, Path(name))
        _alone(options, report, made)
    print(report.markdown())
    if options.json:
        options.json.write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
    return 0


def _beside_peers(
    options: argparse.Namespace, report: Report, replicas: Sequence[Contender], made: Ours, folder: Path
) -> None:
    """What is compared with others runs while all of them do: an idle one costs next to nothing."""
    if not {"costs", "latency"} & set(options.parts):
        return
    with ExitStack() as stack:
        gateways = [stack.enter_context(quantgate(made))]
        if options.before:
            before = ours(replicas, folder / "before", options.before, "before")
            gateways.append(stack.enter_context(quantgate(before)))
        for name in options.peers:
            try:
                gateways.append(stack.enter_context(peer(name, replicas, folder, options.peers_folder)))
                report.versions[name] = PEERS[name].requirement.partition("==")[2]
            except NotThere as why:
                report.skipped[name] = str(why)
        if "costs" in options.parts:
            report.costs = parts.costs([replicas[0], *gateways], options.seconds, options.rounds)
        if "latency" in options.parts:
            report.latencies = [parts.latency(replicas[0], each, options.seconds, options.rounds) for each in gateways]


def _alone(options: argparse.Namespace, report: Report, made: Ours) -> None:
    """What concerns our gateway only, each part with a fresh one."""
    if "soak" in options.parts:
        with quantgate(made) as fresh:
            report.soak = parts.soak(fresh, options.soak_share)
    if "body" in options.parts:
        with quantgate(made) as fresh:
            report.long_body = parts.long_body(fresh)
    if "workers" in options.parts:
        report.scaling = parts.scaling(made, options.seconds)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.overhead", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8, help="of each load in each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument(
        "--peers", type=_words(tuple(PEERS)), default=list(PEERS), help=f"of {','.join(PEERS)}; empty: none"
    )
    parser.add_argument("--parts", type=_words(PARTS), default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--peers-folder", type=Path, default=PEERS_FOLDER, help="where peers are, or are installed")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="measure another checkout of quantgate beside")
    parser.add_argument("--soak-share", type=float, default=1.0, help="less than 1 for a short try")
    parser.add_argument("--json", type=Path, help="write every figure of every round to this file")
    return parser.parse_args(arguments)


def _words(known: Sequence[str]) -> Callable[[str], list[str]]:
    def words(text: str) -> list[str]:
        given = [word for word in text.split(",") if word]
        if unknown := sorted(set(given) - set(known)):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return given

    return words


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
