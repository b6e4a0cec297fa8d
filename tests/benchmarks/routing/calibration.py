"""The capacity of an engine, as `quantgate measure` would write it: the model itself under closed loops."""

import random
import statistics
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from config.capacity import Hardware, Load, Measurement, Percentiles, Setup, Shape
from tests.benchmarks.overhead.figures import percentile
from tests.benchmarks.routing.engine import Engine, Job
from tests.benchmarks.routing.profiles import Profile
from tests.benchmarks.routing.workloads import CHATS, Mix, constant, conversations

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
HARDWARE = Hardware(device="model of an H100", count=1, unit="GPU")
MEASURED = datetime(2026, 1, 1, tzinfo=UTC)  # no moment of this machine: the same profile, the same measurement


def measured(profile: Profile, mix: Mix = CHATS, *, requests: int = 160, seed: int = 1) -> Measurement:
    """Measure an engine that is like its profile; `requests` are timed at each concurrency."""
    lengths = _lengths(mix, seed)
    setup = Setup(hardware=HARDWARE, engine=f"simulated {profile.precision}", max_num_seqs=profile.max_num_seqs)
    levels = [level for level in CONCURRENCIES if level <= profile.max_num_seqs]
    prompt, answer = (round(statistics.fmean(each)) for each in zip(*lengths, strict=True))
    return Measurement(
        setup=setup,
        measured=MEASURED,
        mix=(Shape(prompt_tokens=prompt, answer_tokens=answer, share=1.0),),
        max_model_len_tokens=mix.most_context_tokens,
        kv_capacity_tokens=profile.kv_capacity_tokens,
        memory_bytes=None,
        gpu_memory_bytes=None,
        loads=tuple(_load(profile, lengths, level, max(requests, 2 * level)) for level in levels),
    )


def _lengths(mix: Mix, seed: int) -> list[tuple[int, int]]:
    """Prompts and answers as long as turns of a mix are, in the order of chance."""
    turns = [turn for each in conversations(constant(1.0), 1.0, 1000.0, mix=mix, seed=seed) for turn in each.turns]
    random.Random(seed).shuffle(turns)
    return [(turn.prompt_tokens, turn.answer_tokens) for turn in turns]


class _Loop:
    """So many clients, each asking anew when answered; notes when each token came of those that are timed."""

    def __init__(self, profile: Profile, lengths: Sequence[tuple[int, int]]) -> None:
        self.engine, self.now = Engine(profile), 0.0
        self._lengths = lengths
        self.asked_at: dict[Job, float] = {}
        self.first_at: dict[Job, float] = {}
        self.ended_at: dict[Job, float] = {}

    def ask(self) -> None:
        """Send one more request, whose prompt nobody has sent before."""
        number = len(self.asked_at)
        job = Job(number, *self._lengths[number % len(self._lengths)], chain=())
        self.asked_at[job] = self.now
        self.engine.submit(job)

    def run(self, concurrency: int, answers: int) -> Iterator[tuple[float, int]]:
        """Run until so many are answered; yields for each step its seconds, and for how many it was a gap."""
        for _ in range(concurrency):
            self.ask()
        while len(self.ended_at) < answers:
            seconds = self.engine.begin()
            assert seconds is not None
            self.now += seconds
            made = self.engine.end()
            gaps = sum(1 for _ in self.engine.under_way()) + sum(job not in made.first for job in made.ended)
            yield seconds, gaps
            self.first_at.update(dict.fromkeys(made.first, self.now))
            for job in made.ended:
                self.ended_at[job] = self.now
                self.ask()


def _load(profile: Profile, lengths: Sequence[tuple[int, int]], concurrency: int, requests: int) -> Load:
    loop, gaps = _Loop(profile, lengths), list[float]()
    # Every place is taken once before the clock starts.
    for seconds, count in loop.run(concurrency, concurrency + requests):
        if len(loop.ended_at) >= concurrency:
            gaps += [seconds] * count
    timed = list(loop.ended_at)[concurrency : concurrency + requests]
    seconds = loop.ended_at[timed[-1]] - loop.ended_at[list(loop.ended_at)[concurrency - 1]]
    waits = [loop.first_at[job] - loop.asked_at[job] for job in timed]
    answers = sum(job.answer_tokens for job in timed)
    streaming = sum(loop.ended_at[job] - loop.first_at[job] for job in timed)
    prompts = sum(job.prompt_tokens for job in timed)
    return Load(
        concurrency=concurrency,
        seconds=seconds,
        requests=len(timed),
        errors=0,
        prefill_tokens_per_second=prompts / sum(waits),
        decode_tokens_per_second=(answers - len(timed)) / streaming,
        prompt_tokens_per_second=prompts / seconds,
        output_tokens_per_second=answers / seconds,
        time_to_first_token_seconds=_percentiles(waits),
        inter_token_seconds=_percentiles(gaps),
    )


def _percentiles(values: Sequence[float]) -> Percentiles | None:
    if not values:
        return None
    p50, p90, p95, p99 = (percentile(values, percent) for percent in (50, 90, 95, 99))
    return Percentiles(p50=p50, p90=p90, p95=p95, p99=p99)
