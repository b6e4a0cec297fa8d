"""Reasons why launches cannot succeed, raised as LaunchRefused before a process is started."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from config.errors import ManifestError
from config.vllm import kv_cache_refusal
from serving.errors import LaunchRefused
from serving.preflight.facts import MachineFacts, ModelFacts
from serving.preflight.memory import cache_reason, memory_reasons, oversubscribed_gpus
from serving.preflight.models import cache_dtype_reason, model_reasons, sharing_reasons
from serving.preflight.reading import read_machine, read_model
from serving.preflight.schemes import computes_in, unfit_shape, unloadable
from serving.replica import Launch
from serving.seal import SealCheck, resized_files


def check_servable(launch: Launch) -> None:
    """Raise LaunchRefused if no vLLM can serve this variant as configured, on any machine with this engine."""
    model = _model(launch)
    reasons = unservable(launch, model)
    if reasons:
        raise LaunchRefused(f"{launch.replica_id}: {launch.variant.path}: {'; also: '.join(reasons)}")
    if launch.variant.path and launch.variant.manifest:
        _refuse(launch, resized_files(launch.variant.path, launch.variant.manifest))


def check_placement(launches: Sequence[Launch], machine: MachineFacts | None = None) -> None:
    """Raise LaunchRefused if these launches can't run on this machine together: memory, GPUs, ports, NUMA nodes.

    Only the given launches count; running replicas have their memory already.
    """
    reasons = oversubscribed([(launch, _model(launch)) for launch in launches], machine or read_machine(launches))
    if reasons:
        raise LaunchRefused("\n".join(reasons))


def refuse_altered(launch: Launch, memory: Path, stopped: Callable[[], bool]) -> None:
    """Raise LaunchRefused for a checksum mismatch; reads the files whose digests are not cached in `memory`.

    Interrupted if `stopped` returns true. A variant without a manifest is not checked.
    """
    variant = launch.variant
    if variant.path and variant.manifest:
        _refuse(launch, SealCheck(variant.path, memory, stopped).altered_files(variant.manifest))


def unservable(launch: Launch, model: ModelFacts) -> list[str]:
    """Return why vLLM cannot serve a model as configured; pure."""
    settings, engine = launch.settings, launch.engine
    quantization = model.quantization
    reasons = [
        unloadable(quantization, engine),
        computes_in(quantization, engine, settings.dtype) if quantization else None,
        *model_reasons(model, settings, launch.thinking.parser),
        *(sharing := list(sharing_reasons(model, settings))),
        # Without a valid split there is no shape per rank.
        None if sharing else unfit_shape(model, engine, settings.tensor_parallel),
        cache_dtype_reason(model, settings, engine),
        cache_reason(launch, model),
    ]
    return [reason for reason in reasons if reason]


def oversubscribed(pairs: Sequence[tuple[Launch, ModelFacts]], machine: MachineFacts) -> list[str]:
    """Return why launches cannot run together on a machine; pure."""
    launches = [launch for launch, _ in pairs]
    return [
        *_ports(launches, machine),
        *oversubscribed_gpus(launches, machine.gpus),
        *_nodes(launches, machine),
        *_instructions(pairs, machine),
        *memory_reasons(pairs, machine),
    ]


def _ports(launches: Sequence[Launch], machine: MachineFacts) -> Iterator[str]:
    wanted = Counter(launch.port for launch in launches if launch.port is not None)
    for launch in launches:
        if launch.port in machine.busy_ports:
            yield f"{launch.replica_id}: port {launch.port} is in use; stop its owner or choose another"
        elif launch.port is not None and wanted[launch.port] > 1:
            yield f"{launch.replica_id}: port {launch.port} is also another replica's; choose another"


def _nodes(launches: Sequence[Launch], machine: MachineFacts) -> Iterator[str]:
    for launch in launches:
        ranks = launch.settings.ranks
        if launch.engine == "cpu" and ranks > machine.numa_nodes and launch.settings.cores == "auto":
            yield (
                f"{launch.replica_id}: with cores: auto each of the {ranks} ranks needs a NUMA node, there are "
                f"{machine.numa_nodes}; leave cores out, or lower tensor_parallel"
            )


def _instructions(pairs: Sequence[tuple[Launch, ModelFacts]], machine: MachineFacts) -> Iterator[str]:
    """List the launches for whose weights or KV cache this CPU has no instructions."""
    for launch, model in pairs:
        if launch.engine != "cpu" or machine.flags is None:
            continue
        reasons = (
            None if unloadable(model.quantization, "cpu") else unloadable(model.quantization, "cpu", machine.flags),
            kv_cache_refusal(model.kv_cache_dtype(launch.settings), "cpu", machine.flags),
        )
        yield from (f"{launch.replica_id}: {reason}" for reason in reasons if reason)


def _model(launch: Launch) -> ModelFacts:
    if launch.variant.path is None:
        raise LaunchRefused(f"{launch.replica_id}: variant {launch.variant.name!r} has no path to serve from")
    try:
        return read_model(launch.variant.path)
    except ManifestError as error:
        raise LaunchRefused(f"{launch.replica_id}: {error}") from error


def _refuse(launch: Launch, altered: list[str]) -> None:
    if altered:
        raise LaunchRefused(
            f"{launch.replica_id}: {launch.variant.path}: checksum mismatch: {', '.join(altered)}; "
            "restore the files or quantize again"
        )
