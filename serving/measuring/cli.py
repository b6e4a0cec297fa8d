"""`quantgate measure`: how fast variants are on this machine, or what is known of it as a plot."""

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
from serving.measuring.flags import launch_settings, read_flags
from serving.measuring.hardware import launch_hardware, local_hardware
from serving.measuring.measuring import MeasurementSettings, Reporter, measure
from serving.measuring.server import BenchmarkContext
from serving.measuring.table import measurement_text
from serving.measuring.target import BenchmarkTarget, configured_targets, target_of_flags

DONE, FAILED, USAGE = 0, 1, 2
CPU_CONCURRENCIES, GPU_CONCURRENCIES = (1, 4, 16), (1, 4, 16, 64)
ROOM_IN_THE_QUEUE = 256
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")

_Result = TypeVar("_Result")


class Stopped(Exception):
    """A signal ended the work; everything that was started is gone."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def measure_main(arguments: list[str]) -> int:
    """Measure variants, or plot what was measured."""
    given = read_flags(arguments)
    try:
        return _plot(given) if given.plot else _measure(given)
    except (ConfigError, LaunchRefused, MeasuringRefused) as error:
        _tell(str(error))
        return USAGE
    except (ServingError, OSError) as error:
        _tell(str(error))
        return FAILED
    except Stopped as stopped:
        _tell(f"stopped by {stopped}; nothing was written, nothing is left running")
        return stopped.exit_code


def _measure(given: argparse.Namespace) -> int:
    place = BenchmarkContext(this_machine(home_directory(), process_environment()), home_directory())
    done = []
    for subject in _subjects(given):
        file = given.out or subject.capacity_file
        _require_place(file)
        hardware = given.hardware or _hardware(subject)
        usual = CPU_CONCURRENCIES if hardware.unit == "core" else GPU_CONCURRENCIES
        settings = MeasurementSettings(given.concurrency or usual, given.seconds, given.requests, given.mix)
        reporter = Reporter(_tell, _live)
        measured = uvloop.run(_stoppable(measure(subject, hardware, settings, place, reporter)))
        done.append({"file": str(file), **measured.model_dump(mode="json")})
        if not given.json:
            sys.stdout.write(f"{measurement_text(_name(subject.directory), measured)}\n\n")
            sys.stdout.flush()
        # Read only now: another measurement may have been written meanwhile.
        write_capacity(file, read_capacity(file).merged(measured))
        _tell(f"written to {file}")
    if given.json:
        sys.stdout.write(json.dumps(done, indent=2, ensure_ascii=False) + "\n")
    return DONE


def _subjects(given: argparse.Namespace) -> list[BenchmarkTarget]:
    if given.config:
        return configured_targets(given.config, given.variants, installed_engine)
    options = launch_settings(given)
    if given.url:
        options["api_key"] = process_environment().get("VLLM_API_KEY")
    else:
        options["max_queued"] = max(ROOM_IN_THE_QUEUE, 2 * max(given.concurrency or GPU_CONCURRENCIES))
    return [target_of_flags(Path(each), options, installed_engine) for each in given.variants]


def _hardware(subject: BenchmarkTarget) -> Hardware:
    if subject.launch is not None:
        return launch_hardware(subject.launch)
    assert subject.replica is not None
    address = address_of(subject.replica.url)
    if not address.path and address.host not in LOCAL_HOSTS:
        raise MeasuringRefused(
            f"{subject.replica.url} is another machine; tell its hardware: --hardware 'NVIDIA H100, 2 GPUs'"
        )
    return local_hardware(subject.settings)


def _require_place(file: Path) -> None:
    """Find out before minutes of measuring that the result could not be kept; CapacityError says why."""
    read_capacity(file)
    if not os.access(file.resolve().parent, os.W_OK):
        raise CapacityError(f"{file.parent}: can't be written; choose another place with --out FILE")


def _plot(given: argparse.Namespace) -> int:
    if find_spec("matplotlib") is None:
        raise MeasuringRefused("--plot needs matplotlib; install quantgate[plots]")
    capacities = _capacities(list(map(Path, given.variants)))
    machines = curves_by_machine(capacities)
    if not machines:
        raise MeasuringRefused("--plot: nothing to draw: measure these variants first, without --plot")
    for name, capacity in capacities.items():
        if not capacity.measurements:
            _tell(f"{name}: not measured, not drawn")
    if len(mixes(list(capacities.values()))) > 1:
        _tell("measured with different mixes of requests: the lines are no fair comparison")
    import_module("serving.measuring.plot").write_plot(machines, given.plot)
    sys.stdout.write(f"{given.plot}\n")
    return DONE


def _capacities(places: Sequence[Path]) -> dict[str, Capacity]:
    """Read what was measured; directories that would have the same name go by their paths."""
    names = [_name(place) for place in places]
    return {
        name if names.count(name) == 1 else str(place): read_capacity(place / FILE_NAME if place.is_dir() else place)
        for name, place in zip(names, places, strict=True)
    }


def _name(directory: Path) -> str:
    """A variant's sealed id, or its directory's name."""
    return Manifest.read(directory).id if (directory / MANIFEST_NAME).exists() else directory.resolve().name


async def _stoppable(work: Coroutine[object, object, _Result]) -> _Result:
    """Cancel the work at the first SIGINT or SIGTERM; those that follow don't hurry its clean-up."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    heard: list[int] = []

    def stop(number: int) -> None:
        if not heard:
            heard.append(number)
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if heard:
            raise Stopped(heard[0]) from None
        raise


def _tell(line: str) -> None:
    """Say something that is not data."""
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{clear}quantgate measure: {line}\n")
    sys.stderr.flush()


def _live(line: str) -> None:
    """Show how far it is, where that can be overwritten."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{line}")
        sys.stderr.flush()
