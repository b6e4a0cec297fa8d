"""How the machine's cores are shared out among CPU replicas."""

from pathlib import Path
from typing import Any

import pytest

from config.hardware import Core
from config.schema import ReplicaSettings
from config.variant import PARENT_QUALITY, Variant
from serving.cores import cpu_list, share_cores
from serving.replica import Launch

VARIANT = Variant("a", "bf16", PARENT_QUALITY, Path("/a"))
EIGHT = tuple(Core(cpu // 4, (cpu,)) for cpu in range(8))
THREADS = tuple(Core(0, (cpu, cpu + 4)) for cpu in range(4))
SOME = tuple(Core(0, (cpu,)) for cpu in (2, 3, 5, 7))
INTERLEAVED = tuple(Core(cpu % 2, (cpu,)) for cpu in range(4))


def shares(cores: tuple[Core, ...], *settings: dict[str, Any], engine: Any = "cpu") -> list[str | None]:
    """What replicas with these settings get."""
    replicas = [ReplicaSettings(variant="a", **each) for each in settings]
    launches = [Launch(f"a-{number}", VARIANT, engine, replica) for number, replica in enumerate(replicas)]
    return [launch.cores for launch in share_cores(launches, cores)]


@pytest.mark.parametrize(
    "cores,settings,expected",
    [
        (EIGHT, [{}], ["0-7"]),
        (EIGHT, [{}, {}], ["0-3", "4-7"]),
        (EIGHT, [{}, {}, {}], ["0-1", "2-4", "5-7"]),
        (SOME, [{}, {}], ["2-3", "5,7"]),
        (EIGHT[:2], [{}, {}, {}], ["0-1", "0-1", "0-1"]),
        (THREADS, [{}, {}], ["0-1,4-5", "2-3,6-7"]),
        (INTERLEAVED, [{}, {}], ["0,2", "1,3"]),
        (EIGHT, [{"tensor_parallel": 2}], ["0-3|4-7"]),
        (EIGHT, [{"tensor_parallel": 2}, {}], ["0-1|2-3", "4-7"]),
        (EIGHT[:1], [{"tensor_parallel": 2}], ["0|0"]),
        (EIGHT, [{"cores": "0-5"}, {}], [None, "6-7"]),
        (EIGHT, [{"cores": "0-7"}, {}], [None, "0-7"]),
        ((), [{}], [None]),
    ],
)
def test_shares(cores: tuple[Core, ...], settings: list[dict[str, Any]], expected: list[str | None]) -> None:
    """Each replica gets cores of its own, whole ones and of one node if it can be, or all where there are too few."""
    assert shares(cores, *settings) == expected


@pytest.mark.parametrize(
    "bound,count,expected",
    [
        ({"a-0": "4-7"}, 2, ["4-7", "0-3"]),  # it keeps what it has, whatever its place
        ({"gone-0": "0-1"}, 1, ["2-7"]),  # it still runs
        ({"a-0": "0-3|4-5"}, 2, ["0-3|4-5", "6-7"]),
        ({"a-0": "0-7"}, 2, ["0-3", "4-7"]),  # nothing is left: half of it
        ({"a-0": "0-3", "a-1": "4-7"}, 2, ["0-3", "4-7"]),
    ],
)
def test_replicas_that_run_keep_their_cores(bound: dict[str, str], count: int, expected: list[str]) -> None:
    """A new replica gets cores that no other one runs on, if there are any."""
    launches = [Launch(f"a-{number}", VARIANT, "cpu", ReplicaSettings(variant="a")) for number in range(count)]
    assert [launch.cores for launch in share_cores(launches, EIGHT, bound)] == expected


def test_gpus_need_no_cores() -> None:
    """A replica on a GPU is left alone."""
    assert shares(EIGHT, {}, engine="cuda") == [None]


def test_cpu_list() -> None:
    """Neighbours become a range."""
    assert cpu_list([3, 0, 1, 8]) == "0-1,3,8"
