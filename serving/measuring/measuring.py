"""A subject under load, level by level -> its measurement."""

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
from serving.measuring.server import BenchmarkContext, Server, Tell, death, measured_server
from serving.measuring.streaming import Target
from serving.measuring.target import BenchmarkTarget
from serving.probe import Probe

TIMEOUT = httpx.Timeout(120.0, connect=10.0)
BUSY_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class MeasurementSettings:
    """What is to be measured; `requests` is None for twice the concurrency, `mix` for the machine's default."""

    concurrencies: tuple[int, ...]
    seconds: float
    requests: int | None = None
    mix: tuple[Shape, ...] | None = None

    def effort(self, concurrency: int) -> Effort:
        """How long to observe one level."""
        return Effort(self.seconds, 2 * concurrency if self.requests is None else self.requests)


@dataclass(frozen=True, slots=True)
class Reporter:
    """Output of a benchmark: `tell` prints a line, `progress` updates the status line of a terminal."""

    tell: Tell
    progress: Callable[[str], None]


async def measure(
    subject: BenchmarkTarget,
    hardware: Hardware,
    settings: MeasurementSettings,
    place: BenchmarkContext,
    reporter: Reporter,
) -> Measurement:
    """Measure a target at each concurrency; MeasuringFailed if one gives no result."""
    async with (
        Probe() as probe,
        measured_server(subject, place, probe, reporter.tell) as server,
        aclosing(Clients(TIMEOUT)) as clients,
    ):
        replica = server.replica
        client = clients.reaching(replica.url, replica.tls)
        facts = await engine_facts(client, replica.url)
        longest = replica.max_model_len_tokens
        mix = _fitting(settings.mix or default_mix(hardware, longest), longest)
        target = Target(client, replica.url, replica.served_name, replica.api_key)
        generator = LoadGenerator(target, subject.vocabulary, lambda: request_lengths(mix, longest))
        gpus = used_gpus(subject.launch) if subject.launch else ()
        memory = PeakMemory(server.child.pid if server.child else None, gpus)
        reporter.tell(f"warming up; requests are {', '.join(map(str, mix))} (prompt:answer:share)")
        await generator.warm_up()
        loads = []
        for concurrency in settings.concurrencies:
            loads.append(await _level(generator, concurrency, settings.effort(concurrency), server, reporter))
            memory.sample()
        return Measurement(
            setup=subject.setup(hardware, facts.version),
            measured=datetime.now(UTC).replace(microsecond=0),
            mix=mix,
            max_model_len_tokens=longest,
            kv_capacity_tokens=facts.kv_capacity_tokens,
            memory_bytes=memory.host_bytes,
            gpu_memory_bytes=memory.gpu_bytes,
            loads=tuple(loads),
        )


async def _level(
    generator: LoadGenerator, concurrency: int, effort: Effort, server: Server, reporter: Reporter
) -> Load:
    def progress(done: int) -> None:
        reporter.progress(f"concurrency {concurrency}: {done} requests (at least {effort.requests})")

    progress(0)
    observed = await generator.observe(concurrency, effort, progress)
    load = load_figures(concurrency, observed.exchanges, observed.window)
    if server.child is not None and server.child.exit_code is not None:
        raise MeasuringFailed(f"concurrency {concurrency}: {death(server.child)}")
    reason = frequent_failure(observed.exchanges)
    if load.requests == 0:
        raise MeasuringFailed(f"concurrency {concurrency}: no request succeeded, {load.errors} failed: {reason}")
    answered = f"{load.requests} requests in {load.seconds:.0f} s, {load.output_tokens_per_second:.1f} tokens/s"
    failed = f"; {load.errors} requests failed, most often: {reason}" if load.errors else ""
    reporter.tell(f"concurrency {concurrency}: {answered}{failed}")
    if observed.busy_share > BUSY_SHARE:
        share = f"{observed.busy_share:.0%}"
        reporter.tell(f"concurrency {concurrency}: sending took {share} of a core; the server may be faster than this")
    return load


def _fitting(mix: tuple[Shape, ...], longest: int | None) -> tuple[Shape, ...]:
    reason = too_long(mix, longest)
    if reason:
        raise MeasuringRefused(f"--mix: {reason}, which is all that the server takes; choose shorter requests")
    return mix


def frequent_failure(exchanges: Sequence[Exchange]) -> str:
    """The reason that most failures have."""
    reasons = Counter(each.failure for each in exchanges if each.failure)
    return reasons.most_common(1)[0][0] if reasons else "none was sent in time"
