"""The commands `gateway` and `up`."""

import argparse
import gc
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from config.errors import ConfigError
from config.load import home_directory, load_settings, process_environment
from gateway.app import Addresses, everything, gateway_alone
from gateway.deployment import read_deployment
from gateway.workers import SINGLE_WORKER, WorkerIndex, check_ports, stop_with_parent, workers
from serving.foreground import run_until_signal
from serving.machine import this_machine
from serving.registry import Registry

DEFAULT_CONFIG = Path("quantgate.yaml")


def gateway_main(arguments: list[str]) -> int:
    """Run the gateway, or several workers, in front of replicas that run elsewhere."""
    parser = _parser(
        "gateway", "Serve clients from replicas that run elsewhere: those with a url, and those of `quantgate serve`."
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the client port, at most one per core; "
        "worker K uses the configured admin port + K - 1 (default: %(default)s)",
    )
    # Internal: passed by the parent process to its workers.
    parser.add_argument("--worker", type=WorkerIndex.parse, default=SINGLE_WORKER, help=argparse.SUPPRESS)
    parser.add_argument("--alive", type=int, help=argparse.SUPPRESS)
    parser.add_argument("config", type=Path, nargs="?", default=DEFAULT_CONFIG, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.workers > 1:
        return run_until_signal(lambda: _workers(options.config, options.workers))
    return run_until_signal(lambda: _worker(options.config, options.worker, options.alive))


def settle() -> None:
    """Exempt all objects made so far from garbage collection, and collect rarely: requests make no reference cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@asynccontextmanager
async def _workers(config: Path, count: int) -> AsyncIterator[None]:
    settings = read_deployment(config).settings.gateway
    check_ports(settings, count)
    async with workers(config, count, lambda: _drain_seconds(config, settings.drain_seconds)):
        yield


def _drain_seconds(config: Path, before: float) -> float:
    """Return how long workers may take to drain: by the file now, or by the one before if they refused it."""
    try:
        return max(before, load_settings(config).gateway.drain_seconds)
    except ConfigError:
        return before


@asynccontextmanager
async def _worker(config: Path, index: WorkerIndex, alive: int | None) -> AsyncIterator[None]:
    async with stop_with_parent(alive), gateway_alone(read_deployment(config), config, index):
        settle()
        yield


def up_main(arguments: list[str]) -> int:
    """Run replicas and the gateway on this machine."""
    parser = _parser("up", "Start all replicas of the configuration on this machine, and the gateway in front of them.")
    config = _config_argument(parser, arguments)
    home, environment = home_directory(), process_environment()

    def start() -> AbstractAsyncContextManager[Addresses]:
        return everything(read_deployment(config), this_machine(home, environment), Registry(), home, config)

    return run_until_signal(start)


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"quantgate {command}", description=description)


def _config_argument(parser: argparse.ArgumentParser, arguments: list[str]) -> Path:
    parser.add_argument("config", type=Path, nargs="?", default=DEFAULT_CONFIG, help="default: %(default)s")
    config: Path = parser.parse_args(arguments).config
    return config
