"""The verbs of this room: gateway, up, config."""

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
from gateway.workers import SINGLE_WORKER, WorkerIndex, check_ports, ending_with_parent, workers
from serving.foreground import USAGE, run_until_signal
from serving.machine import this_machine
from serving.registry import Registry

DEFAULT_CONFIG = Path("quantgate.yaml")
GATE = 3
PASSWORD = re.compile(r"(://[^\s:/@]*:)[^\s@]+(@)")  # inside an address, such as gateway.state


def gateway_main(arguments: list[str]) -> int:
    """Run the gateway in front of replicas that somebody else runs."""
    parser = _parser(
        "gateway", "Serve clients from replicas that run elsewhere: those with a url, and those of `quantgate serve`."
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the port, one per core at most; the admin port counts up from the first one's",
    )
    # How a worker is told who it is; not for people.
    parser.add_argument("--worker", type=WorkerIndex.parse, default=SINGLE_WORKER, help=argparse.SUPPRESS)
    parser.add_argument("--alive", type=int, help=argparse.SUPPRESS)
    parser.add_argument("config", type=Path, nargs="?", default=DEFAULT_CONFIG, help="default: %(default)s")
    chosen = parser.parse_args(arguments)
    if chosen.workers > 1:
        return run_until_signal(lambda: _workers(chosen.config, chosen.workers))
    return run_until_signal(lambda: _worker(chosen.config, chosen.worker, chosen.alive))


def settle() -> None:
    """Spare the garbage collector what was made until now and lives as long as the process: requests make no cycles."""
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
async def _worker(config: Path, place: WorkerIndex, alive: int | None) -> AsyncIterator[None]:
    async with ending_with_parent(alive), gateway_alone(read_deployment(config), config, place):
        settle()
        yield


def up_main(arguments: list[str]) -> int:
    """Run replicas and gateway on this machine."""
    parser = _parser("up", "Start every replica of the configuration on this machine, and the gateway in front.")
    config = _config_argument(parser, arguments)
    home, environment = home_directory(), process_environment()

    def start() -> AbstractAsyncContextManager[Addresses]:
        return everything(read_deployment(config), this_machine(home, environment), Registry(), home, config)

    return run_until_signal(start)


def config_main(arguments: list[str]) -> int:
    """Check, show or describe configuration files."""
    parser = _parser("config", "Check a configuration file, show it with its defaults, or print the JSON schema.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="check|show|schema")
    for verb, text in (
        ("check", "list every problem of a file"),
        ("show", "print it with all defaults, secrets masked"),
    ):
        verbs.add_parser(verb, help=text).add_argument("file", type=Path, nargs="?", default=DEFAULT_CONFIG)
    verbs.add_parser("schema", help="print the JSON schema, for editors")
    chosen = parser.parse_args(arguments)
    if chosen.verb == "schema":
        print(json.dumps(Settings.model_json_schema(), indent=2))
        return 0
    try:
        settings = load_settings(chosen.file)
        if chosen.verb == "check":
            return _check(chosen.file, settings)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USAGE
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    print(PASSWORD.sub(r"\1**********\2", text), end="")
    return 0


def _check(file: Path, settings: Settings) -> int:
    """Tell what the manifests mean for the aliases, as far as the variants' directories are on this machine."""
    here = {name: variant for name, variant in settings.variants.items() if _is_here(variant, file.parent)}
    for name in [name for name in settings.variants if name not in here]:
        print(f"{file}: variants.{name}: its directory isn't here, so its manifest was not read", file=sys.stderr)
    aliases = {name: alias for name, alias in settings.aliases.items() if here.keys() >= set(alias.ladder)}
    catalog = Catalog(aliases, read_variants(here, file.parent))
    lost = unservable_aliases(catalog)
    for line in (*excluded_rungs(catalog), *lost):
        print(f"{file}: {line}", file=sys.stderr)
    told = f"{len(lost)} that nothing may answer" if lost else "no problem"
    print(f"{file}: {len(settings.aliases)} aliases, {len(settings.variants)} variants, {told}")
    return GATE if lost else 0


def _is_here(variant: VariantSettings, folder: Path) -> bool:
    return variant.path is None or (folder / Path(variant.path).expanduser()).is_dir()


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"quantgate {verb}", description=description)


def _config_argument(parser: argparse.ArgumentParser, arguments: list[str]) -> Path:
    parser.add_argument("config", type=Path, nargs="?", default=DEFAULT_CONFIG, help="default: %(default)s")
    chosen: Path = parser.parse_args(arguments).config
    return chosen
