"""A target under load, level by level -> its measurement."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx

from config.capacity import Hardware, Load, Measurement, Shape
from serving.clients import Clients
from serving.errors import MeasuringFailed, MeasuringRefused
from serving.measuring.engine_facts import engine_facts
from serving.measuring.figures import Exchange, load_figures
from serving.measuring.hardware import used_gpus
from serving.measuring.load_generator import Effort, LoadGenerator
from serving.measuring.memory import PeakMemory
from serving.measuring.mix import default_mix, request_lengths, too_long
from serving.measuring.server import BenchmarkContext, measured_server
from serving.measuring.streaming import Target
from serving.measuring.target import BenchmarkTarget
from serving.probe import Probe
from serving.process import Child

TIMEOUT = httpx.Timeout(120.0, connect=10.0)
BUSY_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class MeasurementSettings:
    """What is measured; `requests` is None for twice the concurrency, `mix` for the default of the hardware."""

    concurrencies: tuple[int, ...]
    seconds: float
    requests: int | None = None
    mix: tuple[Shape, ...] | None = None


@dataclass(frozen=True, slots=True)
class Reporter:
    """Output of a benchmark: `log` prints a line, `progress` updates the status line of a terminal."""

    log: Callable[[str], None]
    progress: Callable[[str], None]


async def measure(
    target: BenchmarkTarget,
    hardware: Hardware,
    settings: MeasurementSettings,
    context: BenchmarkContext,
    reporter: Reporter,
) -> Measurement:
    """Measure a target at each concurrency; MeasuringFailed if one gives no result."""
    async with (
        Probe() as probe,
        measured_server(target, context, probe, reporter.log) as (replica, child),
        aclosing(Clients(TIMEOUT)) as clients,
    ):
        client, longest = clients.reaching(replica.url, replica.tls), replica.max_model_len_tokens
        facts = await engine_facts(client, replica.url)
        mix = settings.mix or default_mix(hardware, longest)
        if reason := too_long(mix, longest):
            raise MeasuringRefused(f"--mix: {reason}, which is all that the server takes; choose shorter requests")
        server = Target(client, replica.url, replica.served_name, replica.api_key)
        generator = LoadGenerator(server, target.vocabulary, lambda: request_lengths(mix, longest))
        memory = PeakMemory(child.pid if child else None, used_gpus(target.launch) if target.launch else ())
        reporter.log(f"warming up; requests are {', '.join(map(str, mix))} (prompt:answer:share)")
        await generator.warm_up()
        loads = []
        for concurrency in settings.concurrencies:
            effort = Effort(settings.seconds, 2 * concurrency if settings.requests is None else settings.requests)
            loads.append(await _level(generator, concurrency, effort, child, reporter))
            memory.sample()
        return Measurement(
            setup=target.setup(hardware, facts.version),
            measured=datetime.now(UTC).replace(microsecond=0),
            mix=mix,
            max_model_len_tokens=longest,
            kv_capacity_tokens=facts.kv_capacity_tokens,
            memory_bytes=memory.host_bytes,
            gpu_memory_bytes=memory.gpu_bytes,
            loads=tuple(loads),
        )


async def _level(
    generator: LoadGenerator, concurrency: int, effort: Effort, child: Child | None, reporter: Reporter
) -> Load:
    prefix = f"concurrency {concurrency}:"

    def progress(done: int) -> None:
        reporter.progress(f"{prefix} {done} requests (at least {effort.requests})")

    progress(0)
    observed = await generator.observe(concurrency, effort, progress)
    load = load_figures(concurrency, observed.exchanges, observed.window)
    if child is not None and child.exit_code is not None:
        what = f"vLLM ended with exit code {child.exit_code}: {child.last_words()} (log: {child.log})"
        raise MeasuringFailed(f"{prefix} {what}")
    reason = frequent_failure(observed.exchanges)
    if load.requests == 0:
        raise MeasuringFailed(f"{prefix} no request succeeded, {load.errors} failed: {reason}")
    failed = f"; {load.errors} requests failed, most often: {reason}" if load.errors else ""
    rate = f"{load.output_tokens_per_second:.1f} tokens/s"
    reporter.log(f"{prefix} {load.requests} requests in {load.seconds:.0f} s, {rate}{failed}")
    if observed.busy_share > BUSY_SHARE:
        share = f"{observed.busy_share:.0%}"
        reporter.log(f"{prefix} sending took {share} of a core; the server may be faster than this")
    return load


def frequent_failure(exchanges: Sequence[Exchange]) -> str:
    """Return the most frequent reason for a failure."""
    reasons = Counter(each.failure for each in exchanges if each.failure)
    return reasons.most_common(1)[0][0] if reasons else "none was sent in time"
