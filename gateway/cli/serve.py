"""The commands `gateway`, `up` and `config`."""

import argparse
import gc
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import yaml

from config.errors import ConfigError
from config.load import home_directory, load_settings, process_environment
from config.schema import Settings, VariantSettings
from config.variant import read_variants
from gateway.app import Addresses, everything, gateway_alone
from gateway.deployment import read_deployment
from gateway.routing.target import Catalog, excluded_rungs, unservable_aliases
from gateway.workers import SINGLE_WORKER, WorkerIndex, check_ports, stop_with_parent, workers
from serving.foreground import USAGE, run_until_signal
from serving.machine import this_machine
from serving.registry import Registry

DEFAULT_CONFIG = Path("quantgate.yaml")
UNSERVABLE = 3  # exit code of `config check`: an alias has no variant that may serve it
PASSWORD = re.compile(r"(://[^\s:/@]*:)[^\s@]+(@)")  # in a URL, such as gateway.state


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
    async with workers(config, count, settings.drain_seconds):
        yield


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


def config_main(arguments: list[str]) -> int:
    """Check or show a configuration file, or print the JSON schema; exit codes: 0, 2 invalid, 3 unservable alias."""
    parser = _parser("config", "Check a configuration file, show it with its defaults, or print the JSON schema.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|show|schema")
    for action, text in (
        ("check", "list all problems of a file"),
        ("show", "print a file with all defaults, secrets masked"),
    ):
        actions.add_parser(action, help=text).add_argument("file", type=Path, nargs="?", default=DEFAULT_CONFIG)
    actions.add_parser("schema", help="print the JSON schema, for editors")
    options = parser.parse_args(arguments)
    if options.action == "schema":
        print(json.dumps(Settings.model_json_schema(), indent=2))
        return 0
    try:
        settings = load_settings(options.file)
        if options.action == "check":
            return _check(options.file, settings)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USAGE
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    print(PASSWORD.sub(r"\1**********\2", text), end="")
    return 0


def _check(file: Path, settings: Settings) -> int:
    """Report rungs and aliases that the manifests rule out, for the variants whose directories are on this machine."""
    local = {name: variant for name, variant in settings.variants.items() if _is_local(variant, file.parent)}
    for name in [name for name in settings.variants if name not in local]:
        print(f"{file}: variants.{name}: directory not found here, manifest not checked", file=sys.stderr)
    aliases = {name: alias for name, alias in settings.aliases.items() if local.keys() >= set(alias.ladder)}
    catalog = Catalog(aliases, read_variants(local, file.parent))
    unservable = unservable_aliases(catalog)
    for line in (*excluded_rungs(catalog), *unservable):
        print(f"{file}: {line}", file=sys.stderr)
    result = f"{len(unservable)} unservable" if unservable else "no problems"
    print(f"{file}: {len(settings.aliases)} aliases, {len(settings.variants)} variants, {result}")
    return UNSERVABLE if unservable else 0


def _is_local(variant: VariantSettings, folder: Path) -> bool:
    return variant.path is None or (folder / Path(variant.path).expanduser()).is_dir()


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"quantgate {command}", description=description)


def _config_argument(parser: argparse.ArgumentParser, arguments: list[str]) -> Path:
    parser.add_argument("config", type=Path, nargs="?", default=DEFAULT_CONFIG, help="default: %(default)s")
    config: Path = parser.parse_args(arguments).config
    return config
