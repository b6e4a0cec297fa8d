"""The commands `gateway`, `up` and `config`."""

import argparse
import gc
import json
import logging
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import yaml

from config.command_line import add_config, chosen_config, exit_codes
from config.errors import ConfigError
from config.load import home_directory, load_settings, process_environment
from config.schema import GatewaySettings, Settings, VariantSettings
from config.variant import read_variants
from gateway.app import everything, gateway_alone
from gateway.deployment import read_deployment
from gateway.routing.target import Catalog, excluded_rungs, unservable_aliases
from gateway.workers import SINGLE_WORKER, WorkerIndex, check_ports, stop_with_parent, workers
from serving.control import Controlled, ControlSocket
from serving.foreground import USAGE, run_until_signal
from serving.machine import this_machine
from serving.registry import Registry

log = logging.getLogger(__name__)

UNSERVABLE = 3  # exit code of `config check`: an alias has no variant that may serve it
PASSWORD = re.compile(r"(://[^\s:/@]*:)[^\s@]+(@)")  # in a URL, such as gateway.state


def gateway_main(arguments: list[str]) -> int:
    """Run the gateway, or several workers, in front of replicas that run elsewhere."""
    parser = _parser(
        "gateway",
        "Serve clients from replicas that run elsewhere: those with a url, and those of `quantgate serve`.",
        exit_codes(0, 2),
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
    add_config(parser)
    options = parser.parse_args(arguments)
    config, cores = chosen_config(parser, options), len(os.sched_getaffinity(0))
    if options.workers > cores and not options.force:
        parser.error(f"--workers {options.workers}: more than the {cores} cores that this process may use; see --force")
    home = control_home()
    if options.workers > 1:
        return run_until_signal(lambda: _workers(config, options.workers, home))
    return run_until_signal(lambda: _worker(config, options.worker, options.alive, home))


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
    async with control, workers(config, count, settings.drain_seconds):
        log.info("%d workers; %s", count, _until_stopped(settings))
        yield


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
    parser = _parser(
        "up",
        "Start all replicas of the configuration on this machine, and the gateway in front of them.",
        exit_codes(0, 2, 4),
    )
    add_config(parser)
    config = chosen_config(parser, parser.parse_args(arguments))
    home, environment = home_directory(), process_environment()

    @asynccontextmanager
    async def start() -> AsyncIterator[None]:
        deployment = read_deployment(config)
        async with everything(deployment, this_machine(home, environment), Registry(), home, config):
            log.info("%s", _until_stopped(deployment.settings.gateway))
            yield

    return run_until_signal(start)


def config_main(arguments: list[str]) -> int:
    """Check or show a configuration file, or print the JSON schema; exit codes: 0, 2 invalid, 3 unservable alias."""
    codes = exit_codes(0, 2, code_3="check: an alias has no variant that may answer it")
    description = "Check a configuration file, show it with its defaults, or print the JSON schema."
    parser = _parser("config", description, codes)
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|show|schema")
    for action, text in (
        ("check", "list all problems of a file"),
        ("show", "print a file with all defaults, secrets masked"),
    ):
        add_config(actions.add_parser(action, help=text, description=text, epilog=codes))
    actions.add_parser("schema", help="print the JSON schema, for editors", epilog=codes)
    options = parser.parse_args(arguments)
    if options.action == "schema":
        print(json.dumps(Settings.model_json_schema(), indent=2))
        return 0
    options.file = chosen_config(parser, options)
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


def _parser(command: str, description: str, epilog: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"quantgate {command}", description=description, epilog=epilog)
