"""The commands `gateway` and `up`."""

import argparse
import gc
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from config.command_line import CommandParser, add_config, chosen_config, exit_codes
from config.errors import ConfigError
from config.load import home_directory, load_settings, process_environment
from config.schema import GatewaySettings
from gateway.app import everything, gateway_alone
from gateway.cli.next_steps import next_steps
from gateway.deployment import read_deployment
from gateway.workers import SINGLE_WORKER, WorkerIndex, check_ports, stop_with_parent, workers
from serving.control import Controlled, ControlSocket
from serving.foreground import run_until_signal
from serving.machine import this_machine
from serving.registry import Registry

log = logging.getLogger(__name__)


def gateway_main(arguments: list[str]) -> int:
    """Run the gateway, or several workers, in front of replicas that run elsewhere."""
    parser = gateway_parser()
    options = parser.parse_args(arguments)
    config, cores = chosen_config(parser, options), len(os.sched_getaffinity(0))
    if options.workers > cores and not options.force:
        parser.error(f"--workers {options.workers}: more than the {cores} cores that this process may use; see --force")
    home = control_home()
    if options.workers > 1:
        return run_until_signal(lambda: _workers(config, options.workers, home))
    place = replace(options.worker, polls=options.polls)
    return run_until_signal(lambda: _worker(config, place, options.alive, home))


def gateway_parser() -> CommandParser:
    """Describe `quantgate gateway`."""
    parser = _parser(
        "gateway",
        "Serve clients from replicas that run elsewhere: those with a url, and those of `quantgate serve`.",
        exit_codes(0, 2),
        "quantgate gateway quantgate.yaml --workers 2",
    )
    parser.add_argument(
        "--workers",
        type=worker_count,
        default=1,
        metavar="N",
        help="processes that share the client port, at most one per core; "
        "worker K uses the configured admin port + K - 1 (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="allow more workers than cores")
    # Internal: passed by the parent process to its workers.
    parser.add_argument("--worker", type=WorkerIndex.parse, default=SINGLE_WORKER, help=argparse.SUPPRESS)
    parser.add_argument("--alive", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--polls", type=descriptors, default=(), help=argparse.SUPPRESS)
    add_config(parser)
    return parser


def descriptors(text: str) -> tuple[int, ...]:
    """Parse descriptors such as `5,6`; ValueError if one is not a number."""
    return tuple([int(number) for number in text.split(",")])


def control_home() -> Path | None:
    """Return the home for the control socket; None for a user without one, as in containers with arbitrary users."""
    try:
        return home_directory()
    except RuntimeError:
        return None


def worker_count(text: str) -> int:
    """Parse a number of workers; ArgumentTypeError if there would be none."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of workers; the least is 1")
    return int(text)


def settle() -> None:
    """Exempt all objects made so far from garbage collection, and collect rarely: requests make no reference cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@asynccontextmanager
async def _workers(config: Path, count: int, home: Path | None) -> AsyncIterator[None]:
    settings = read_deployment(config).settings.gateway
    check_ports(settings, count)
    addresses = {"clients": f"http://{settings.listen}", "admin of worker 1": f"http://{settings.admin}"}
    process = Controlled("gateway", config, addresses=addresses)
    control = ControlSocket(home, process) if home else nullcontext()
    async with control, workers(config, count, lambda: _drain_seconds(config, settings.drain_seconds)):
        log.info("%d workers; %s", count, _until_stopped(settings))
        yield


def _drain_seconds(config: Path, before: float) -> float:
    """Return how long workers may take to drain: by the file now, or by the one before if they refused it."""
    try:
        return max(before, load_settings(config).gateway.drain_seconds)
    except ConfigError:
        return before


@asynccontextmanager
async def _worker(config: Path, index: WorkerIndex, alive: int | None, home: Path | None) -> AsyncIterator[None]:
    deployment = read_deployment(config)
    async with (
        stop_with_parent(alive),
        gateway_alone(deployment, config, index, home if alive is None else None),
    ):
        settle()
        if alive is None:
            log.info("%s", _until_stopped(deployment.settings.gateway))
        yield


def _until_stopped(settings: GatewaySettings) -> str:
    return (
        f"SIGTERM or Ctrl-C stops the gateway; running requests finish first, for at most {settings.drain_seconds:g} s"
    )


def up_main(arguments: list[str]) -> int:
    """Run replicas and the gateway on this machine."""
    parser = up_parser()
    config = chosen_config(parser, parser.parse_args(arguments))
    home, environment = home_directory(), process_environment()

    @asynccontextmanager
    async def start() -> AsyncIterator[None]:
        deployment = read_deployment(config)
        machine = this_machine(home, environment)
        async with everything(deployment, machine, Registry(), home, config) as addresses:
            log.info("%s", _until_stopped(deployment.settings.gateway))
            keys = deployment.keys.issued is not None
            print(next_steps(deployment.settings, addresses, config, keys=keys), file=sys.stderr, flush=True)
            yield

    return run_until_signal(start)


def up_parser() -> CommandParser:
    """Describe `quantgate up`."""
    parser = _parser(
        "up",
        "Start all replicas of the configuration on this machine, and the gateway in front of them. Once the gateway "
        "listens, what to do next is printed on stderr.",
        exit_codes(0, 2, 4),
        "quantgate up quantgate.yaml",
    )
    add_config(parser)
    return parser


def _parser(command: str, description: str, epilog: str, *examples: str) -> CommandParser:
    return CommandParser(prog=f"quantgate {command}", description=description, epilog=epilog, examples=examples)
