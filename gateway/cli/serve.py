"""The commands `gateway` and `up`."""

import argparse
import asyncio
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
from gateway.app import url_of
from gateway.cli.next_steps import next_steps
from gateway.deployment import read_deployment
from gateway.handover import Origin, offered_to_successor, origin_of
from gateway.http.sockets import ADMIN, CLIENT, InheritedSockets, activated_sockets, sockets_of
from gateway.process import ProcessContext, everything, gateway_alone
from gateway.workers import (
    SINGLE_WORKER,
    WorkerIndex,
    Workers,
    WorkerSockets,
    stop_with_parent,
    worker_sockets,
    workers,
)
from serving.control import Controlled, ControlSocket
from serving.errors import TakeoverRefused
from serving.foreground import run_until_signal
from serving.machine import this_machine
from serving.registry import Registry
from serving.service_manager import ServiceManager
from serving.takeover import Predecessor

log = logging.getLogger(__name__)

# Longer than one waits for its replicas.
WORKERS_LISTEN_SECONDS = 90.0


def gateway_main(arguments: list[str]) -> int:
    """Run the gateway, or several workers, in front of replicas that run elsewhere."""
    parser = gateway_parser()
    options = parser.parse_args(arguments)
    config, cores = chosen_config(parser, options), len(os.sched_getaffinity(0))
    if options.workers > cores and not options.force:
        parser.error(f"--workers {options.workers}: more than the {cores} cores that this process may use; see --force")
    if options.sockets is not None:
        return run_until_signal(lambda: _worker(config, options))
    environment, home = process_environment(), control_home()
    if options.takeover and home is None:
        parser.error("--takeover finds the gateway that runs by its home; set QUANTGATE_HOME")
    manager = ServiceManager.of(environment)

    @asynccontextmanager
    async def start() -> AsyncIterator[None]:
        with origin_of(config, environment, home if options.takeover else None) as origin:
            async with (
                _workers(config, options.workers, home, origin, manager)
                if options.workers > 1
                else _single(config, home, origin, manager)
            ):
                yield

    return run_until_signal(start)


def gateway_parser() -> CommandParser:
    """Describe `quantgate gateway`."""
    parser = _parser(
        "gateway",
        "Serve clients from replicas that run elsewhere: those with a url, pods, and those of `quantgate serve`.",
        exit_codes(0, 2),
        "quantgate gateway quantgate.yaml --workers 2",
        "quantgate gateway quantgate.yaml --takeover",
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
    parser.add_argument(
        "--takeover",
        action="store_true",
        help="take the listening sockets over from the gateway that runs with this configuration file: once this one "
        "is ready, that one accepts no more connections, finishes its requests and ends. If this one is not ready "
        "within a minute, it exits with code 2, and that one goes on",
    )
    # Internal: passed by the parent process to its workers.
    parser.add_argument("--worker", type=WorkerIndex.parse, default=SINGLE_WORKER, help=argparse.SUPPRESS)
    parser.add_argument("--alive", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--listening", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sockets", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--sockets-kept", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--verified", action="store_true", help=argparse.SUPPRESS)
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
async def _single(config: Path, home: Path | None, origin: Origin, manager: ServiceManager) -> AsyncIterator[None]:
    deployment, predecessor = read_deployment(config), origin.predecessor
    process = ProcessContext(
        home=home,
        inherited=origin.sockets,
        predecessor=predecessor,
        verified=predecessor is not None,
        manager=manager,
    )
    async with gateway_alone(deployment, config, process) as addresses:
        settle()
        manager.ready(f"listening on {addresses.client}")
        log.info("%s", _until_stopped(deployment.settings.gateway))
        yield


@asynccontextmanager
async def _workers(
    config: Path, count: int, home: Path | None, origin: Origin, manager: ServiceManager
) -> AsyncIterator[None]:
    settings, predecessor = read_deployment(config).settings.gateway, origin.predecessor
    addresses = {"clients": url_of(settings, settings.listen), "admin of worker 1": f"http://{settings.admin}"}
    process = Controlled("gateway", config, addresses=addresses)
    with worker_sockets(settings, count, origin.sockets) as sockets:
        async with (
            ControlSocket(home, process) if home else nullcontext() as control,
            workers(config, sockets, lambda: _drain_seconds(config, settings.drain_seconds), manager) as running,
        ):
            if predecessor is not None:
                await _replace(predecessor, running, sockets)
            with offered_to_successor(control, sockets.by_name, sockets, manager):
                async with running.announced(f"{count} workers on {settings.listen}"):
                    log.info("%d workers; %s", count, _until_stopped(settings))
                    yield


async def _replace(predecessor: Predecessor, running: Workers, sockets: WorkerSockets) -> None:
    """Let a predecessor stop once all workers accept connections; TakeoverRefused if they do not in time."""
    try:
        async with asyncio.timeout(WORKERS_LISTEN_SECONDS):
            await running.listening()
    except TimeoutError:
        what = f"{running.missing} of {running.count} workers are not ready after {WORKERS_LISTEN_SECONDS:g} s"
        raise TakeoverRefused(f"{what}; the gateway that runs goes on") from None
    predecessor.commit()
    sockets.next_acceptor = "none"


def _drain_seconds(config: Path, before: float) -> float:
    """Return how long workers may take to drain: by the file now, or by the one before if they refused it."""
    try:
        return max(before, load_settings(config).gateway.drain_seconds)
    except ConfigError:
        return before


@asynccontextmanager
async def _worker(config: Path, options: argparse.Namespace) -> AsyncIterator[None]:
    for descriptor in (options.alive, options.listening, *options.polls):
        os.set_inheritable(descriptor, False)
    named = dict(zip((CLIENT, ADMIN), options.sockets, strict=True))
    sockets = InheritedSockets(sockets_of(named), "next start" if options.sockets_kept else "none")
    place = replace(options.worker, polls=options.polls)
    process = ProcessContext(place, inherited=sockets, verified=options.verified)
    async with stop_with_parent(options.alive), gateway_alone(read_deployment(config), config, process):
        settle()
        os.write(options.listening, b".")
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
        process = ProcessContext(
            inherited=activated_sockets(environment, os.getpid()), manager=ServiceManager.of(environment)
        )
        async with everything(deployment, machine, Registry(), home, config, process=process) as addresses:
            process.manager.ready(f"listening on {addresses.client}")
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
