"""Assignment of cores to CPU replicas; pure.

Two replicas on the same cores slow each other down by more than half, because threads spin while waiting for one that
is not scheduled. So each gets its own cores where there are enough. Threads of a physical core stay together, and so do
cores of one NUMA node. Tokens/s of SmolLM2-135M on two cores with vLLM 0.32, for one request (and four) per replica:

    two replicas, a core each        56 (224)
    two replicas, both on both       36 (115)
    ... with OMP_WAIT_POLICY=PASSIVE 21 (68), and one alone falls from 61 to 38
    ... with Intel's OpenMP          16 (72), and one alone rises from 61 to 70

So neither of the last two is set: the first never helps, the second only a single replica.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

from config.hardware import Core, parse_cpus
from serving.replica import Launch

NOTHING_BOUND: Mapping[str, str] = MappingProxyType({})


def share_cores(
    launches: Sequence[Launch], cores: Sequence[Core], bound: Mapping[str, str] = NOTHING_BOUND
) -> tuple[Launch, ...]:
    """Give each CPU replica its part of the machine's cores, or all of them where there are too few.

    Replicas that the configuration binds keep that, and so do those that run: `bound` has their cores by id. The others
    share what those leave. Where nothing is left, they share with those that run, which would have to be restarted to
    change.
    """
    named = {cpu for launch in launches for cpu in parse_cpus(launch.settings.cores or "")}
    taken = named | {cpu for cpus in bound.values() for rank in cpus.split("|") for cpu in parse_cpus(rank)}
    if left := [core for core in cores if not taken & set(core.cpus)]:
        kept = bound
    else:
        left, kept = [core for core in cores if not named & set(core.cpus)] or list(cores), NOTHING_BOUND
    waiting = [
        launch
        for launch in launches
        if cores and launch.engine == "cpu" and launch.settings.cores is None and launch.replica_id not in kept
    ]
    parts = iter(_parts(left, len(waiting)))
    shares = {launch.replica_id: _binding(next(parts), launch.settings.ranks) for launch in waiting}
    return tuple(
        dataclasses.replace(launch, cores=shares.get(launch.replica_id, kept.get(launch.replica_id)))
        for launch in launches
    )


def cpu_list(cpus: Iterable[int]) -> str:
    """Write logical CPUs as vLLM reads them: `0-3,8`."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _binding(cores: Sequence[Core], ranks: int) -> str:
    """One list of CPUs per rank: `0-3|4-7`."""
    return "|".join(cpu_list(cpu for core in part for cpu in core.cpus) for part in _parts(cores, ranks))


def _parts(cores: Sequence[Core], count: int) -> list[Sequence[Core]]:
    """Cut into `count` parts as even as possible, by NUMA node; all parts get all cores where there are too few."""
    if len(cores) < count:
        return [cores] * count
    ordered = sorted(cores, key=lambda core: (core.node, core.cpus))
    ends = [len(ordered) * number // count for number in range(count + 1)] if count else []
    return [ordered[start:end] for start, end in pairwise(ends)]
