"""`quantgate measure`: measure the speed of variants on this machine, or plot their measurements."""

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import uvloop

from config.capacity import FILE_NAME, Capacity, Hardware, read_capacity, write_capacity
from config.curves import curves_by_machine, mixes
from config.errors import CapacityError, ConfigError
from config.load import home_directory, process_environment
from config.manifest import FILE_NAME as MANIFEST_NAME
from config.manifest import Manifest
from serving.address import address_of
from serving.errors import LaunchRefused, MeasuringRefused, ServingError
from serving.machine import installed_engine, this_machine
from serving.measuring.flags import launch_settings, measure_parser, read_flags
from serving.measuring.hardware import launch_hardware, local_hardware
from serving.measuring.measuring import MeasurementSettings, Reporter, measure
from serving.measuring.server import BenchmarkContext
from serving.measuring.table import measurement_text
from serving.measuring.target import BenchmarkTarget, configured_targets, target_of_flags

__all__ = ["measure_main", "measure_parser"]

DONE, FAILED, USAGE = 0, 1, 2
CPU_CONCURRENCIES, GPU_CONCURRENCIES = (1, 4, 16), (1, 4, 16, 64)
MIN_QUEUED = 256
CLEAR_LINE = "\r\033[K"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")

_Result = TypeVar("_Result")


class Stopped(Exception):
    """A signal ended the measurement; everything that was started is gone."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def measure_main(arguments: list[str]) -> int:
    """Measure variants, or plot their measurements."""
    options = read_flags(arguments)
    try:
        return _plot(options) if options.plot else _measure(options)
    except (ConfigError, LaunchRefused, MeasuringRefused) as error:
        _log(str(error))
        return USAGE
    except (ServingError, OSError) as error:
        _log(str(error))
        return FAILED
    except Stopped as stopped:
        _log(f"stopped by {stopped}; nothing was written, nothing is left running")
        return stopped.exit_code


def _measure(options: argparse.Namespace) -> int:
    context = BenchmarkContext(this_machine(home_directory(), process_environment()), home_directory())
    reporter = Reporter(_log, _progress)
    results = []
    for target in _targets(options):
        file = options.out or target.capacity_file
        _require_writable(file)
        hardware = options.hardware or _hardware(target)
        default = CPU_CONCURRENCIES if hardware.unit == "core" else GPU_CONCURRENCIES
        settings = MeasurementSettings(options.concurrency or default, options.seconds, options.requests, options.mix)
        measured = uvloop.run(_stoppable(measure(target, hardware, settings, context, reporter)))
        results.append({"file": str(file), **measured.model_dump(mode="json")})
        if not options.json:
            sys.stdout.write(f"{measurement_text(_name(target.directory), measured)}\n\n")
            sys.stdout.flush()
        # Read again: another measurement may have been written meanwhile.
        write_capacity(file, read_capacity(file).merged(measured))
        _log(f"written to {file}")
    if options.json:
        sys.stdout.write(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return DONE


def _targets(options: argparse.Namespace) -> list[BenchmarkTarget]:
    if options.config:
        return configured_targets(options.config, options.variants, installed_engine)
    settings = launch_settings(options)
    if options.url:
        settings["api_key"] = process_environment().get("VLLM_API_KEY")
    else:
        settings["max_queued"] = max(MIN_QUEUED, 2 * max(options.concurrency or GPU_CONCURRENCIES))
    return [target_of_flags(Path(each), settings, installed_engine) for each in options.variants]


def _hardware(target: BenchmarkTarget) -> Hardware:
    if target.launch is not None:
        return launch_hardware(target.launch)
    assert target.replica is not None
    address = address_of(target.replica.url)
    if not address.path and address.host not in LOCAL_HOSTS:
        raise MeasuringRefused(
            f"{target.replica.url} is another machine; tell its hardware: --hardware 'NVIDIA H100, 2 GPUs'"
        )
    return local_hardware(target.settings)


def _require_writable(file: Path) -> None:
    """Check before the measurement that its result can be written; CapacityError if not."""
    read_capacity(file)
    if not os.access(file.resolve().parent, os.W_OK):
        raise CapacityError(f"{file.parent}: can't be written; choose another place with --out FILE")


def _plot(options: argparse.Namespace) -> int:
    if find_spec("matplotlib") is None:
        raise MeasuringRefused("--plot needs matplotlib; install quantgate[plots]")
    capacities = _capacities(list(map(Path, options.variants)))
    machines = curves_by_machine(capacities)
    if not machines:
        raise MeasuringRefused("--plot: nothing to draw: measure these variants first, without --plot")
    for name, capacity in capacities.items():
        if not capacity.measurements:
            _log(f"{name}: not measured, not drawn")
    if len(mixes(list(capacities.values()))) > 1:
        _log("measured with different mixes of requests: the lines are no fair comparison")
    import_module("serving.measuring.plot").write_plot(machines, options.plot)
    sys.stdout.write(f"{options.plot}\n")
    return DONE


def _capacities(paths: Sequence[Path]) -> dict[str, Capacity]:
    """Read measurements by name; directories of the same name go by their paths."""
    names = [_name(path) for path in paths]
    return {
        name if names.count(name) == 1 else str(path): read_capacity(path / FILE_NAME if path.is_dir() else path)
        for name, path in zip(names, paths, strict=True)
    }


def _name(directory: Path) -> str:
    """A variant's sealed id, or its directory's name."""
    return Manifest.read(directory).id if (directory / MANIFEST_NAME).exists() else directory.resolve().name


async def _stoppable(work: Coroutine[object, object, _Result]) -> _Result:
    """Cancel the work at the first SIGINT or SIGTERM; later ones do not interrupt its clean-up."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    signals: list[int] = []

    def stop(number: int) -> None:
        if not signals:
            task.cancel()
        signals.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if signals:
            raise Stopped(signals[0]) from None
        raise


def _log(line: str) -> None:
    """Print a line that is not data."""
    clear = CLEAR_LINE if sys.stderr.isatty() else ""
    sys.stderr.write(f"{clear}quantgate measure: {line}\n")
    sys.stderr.flush()


def _progress(line: str) -> None:
    """Update the status line of a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{CLEAR_LINE}{line}")
        sys.stderr.flush()
