"""The parts of the benchmark, one function each; each returns what it found, for `report` to write."""

import asyncio
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import uvloop

from config.load import process_environment
from tests.benchmarks.overhead.client import asked, at_a_rate, at_once, connected, timed
from tests.benchmarks.overhead.contenders import Ours, alive, quantgate
from tests.benchmarks.overhead.figures import Added, Cost, Tally, added, gaps, journeys, tally_of, tally_of_wrk
from tests.benchmarks.overhead.loads import CONNECTIONS, LOADS, PATH, PLAIN, Contender, Load
from tests.benchmarks.overhead.processes import cpu_seconds, resident_bytes, running, until

SCRIPT = Path(__file__).with_name("chat.lua")
RATE_PER_SECOND = 500.0
SOAK_REQUESTS, SOAK_CHUNKS, SOAK_STEPS = 100_000, 1_000_000, 10
SOAK_STREAM = Load("stream of 1,000 chunks at once", 1000)
BODY_BYTES, BODY_ROUNDS = 10_000_000, 7
STARTS = 5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LatencyFound:
    """What a gateway adds: to a plain request, to the gap between two chunks, to a chunk's way."""

    contender: str
    plain: Added
    gap: Added
    journey: Added


@dataclass(frozen=True, slots=True)
class LongBody:
    """CPU milliseconds for one long request: the gateway's, and what its parsers need for the same bytes here."""

    body_bytes: int
    gateway_ms: float
    top_level_ms: float  # msgspec, values kept as bytes
    whole_ms: float  # msgspec, every value made


@dataclass(frozen=True, slots=True)
class Rest:
    """How memory goes over a long time: resident megabytes after each tenth."""

    what: str
    megabytes: list[float]
    bad: int


@dataclass(frozen=True, slots=True)
class Scaled:
    """What a number of workers answers."""

    workers: int
    tally: Tally


def costs(contenders: Sequence[Contender], seconds: float, rounds: int, loads: Sequence[Load] = LOADS) -> list[Cost]:
    """Load every contender in turn, round by round, so that what else the machine does hits all of them alike."""
    found = []
    for load in loads:
        for number in range(rounds):
            for contender in contenders:
                print(f"{load.name}, round {number + 1}: {contender.name}", file=sys.stderr)
                before = cpu_seconds(contender.pid) if contender.pid else 0.0
                tally = loaded(contender, load, seconds)
                spent = cpu_seconds(contender.pid) - before if contender.pid else 0.0
                resident = resident_bytes(contender.pid) if contender.pid else 0
                found.append(Cost(contender.name, load.name, load.chunks, tally, spent, resident))
    return found


def loaded(contender: Contender, load: Load, seconds: float) -> Tally:
    """Ask on 32 connections for so long: with wrk, or without it with our own client, which costs more CPU itself."""
    wrk = shutil.which("wrk")
    if wrk is None:
        return tally_of(_run(timed(contender, load, seconds)), load, seconds)
    with tempfile.NamedTemporaryFile() as body:
        body.write(load.body(contender.model))
        body.flush()
        told = {"OVERHEAD_BODY": body.name, "OVERHEAD_KEY": contender.key}
        argv = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{max(round(seconds), 1)}s", "--timeout", "20s", "-s", str(SCRIPT)]
        done = subprocess.run(
            [*argv, f"http://{contender.host}:{contender.port}{PATH}"],
            env={**process_environment(), **told},
            check=True,
            capture_output=True,
            text=True,
        )
    return tally_of_wrk(done.stdout)


def latency(direct: Contender, through: Contender, seconds: float, rounds: int) -> LatencyFound:
    """Ask directly and through a gateway, in the same run."""
    pairs = _run(at_a_rate(direct, through, PLAIN, RATE_PER_SECOND, seconds * rounds))
    stream = Load("stream, 4 ms apart", round(seconds * 250), 4)
    streams: dict[str, list[Any]] = {direct.name: [], through.name: []}
    for number in range(rounds):
        for contender in (direct, through) if number % 2 else (through, direct):
            streams[contender.name] += _run(at_once(contender, stream))
    near, far = streams[direct.name], streams[through.name]
    assert all(answer.good(stream) for answer in near + far)
    return LatencyFound(
        through.name,
        added([mine.seconds for mine, _ in pairs], [other.seconds for _, other in pairs], paired=True),
        added(gaps(near), gaps(far), paired=False),
        added(journeys(near), journeys(far), paired=False),
    )


def soak(contender: Contender, share: float = 1.0) -> list[Rest]:
    """10^5 requests, then 10^6 chunks; `share` of them for a short try."""
    assert contender.pid is not None
    found = []
    for load, count in ((PLAIN, SOAK_REQUESTS), (SOAK_STREAM, SOAK_CHUNKS // SOAK_STREAM.chunks)):
        megabytes, bad = [resident_bytes(contender.pid) / 1e6], 0
        for step in range(SOAK_STEPS):
            print(f"soak: {load.name}, tenth {step + 1}", file=sys.stderr)
            bad += _run(asked(contender, load, max(round(count * share / SOAK_STEPS), 1)))
            megabytes.append(resident_bytes(contender.pid) / 1e6)
        found.append(Rest(f"{round(count * share):,} x {load.name}", megabytes, bad))
    return found


def long_body(contender: Contender) -> LongBody:
    """Ask with one long message, the median of several times."""
    assert contender.pid is not None
    fields = msgspec.json.decode(PLAIN.body(contender.model), type=dict[str, Any])
    text = "All that is long is not a list. " * (BODY_BYTES // 32)
    body = msgspec.json.encode({**fields, "messages": [{"role": "user", "content": text}]})
    spent = []
    for _ in range(BODY_ROUNDS):
        before = cpu_seconds(contender.pid)
        assert _run(_one(contender, body))
        spent.append((cpu_seconds(contender.pid) - before) * 1000)
    return LongBody(
        len(body),
        statistics.median(spent),
        _decoding_ms(body, dict[str, msgspec.Raw]),
        _decoding_ms(body, dict[str, Any]),
    )


async def _one(contender: Contender, body: bytes) -> bool:
    async with connected(contender, 1) as lines:
        return (await lines.ask(contender.with_body(body))).good(PLAIN)


def _decoding_ms(body: bytes, kind: Any) -> float:
    decoder, spent = msgspec.json.Decoder(kind), []
    for _ in range(BODY_ROUNDS):
        before = time.thread_time()
        decoder.decode(body)
        spent.append((time.thread_time() - before) * 1000)
    return statistics.median(spent)


def starts(made: Ours) -> list[float]:
    """Seconds from the program's start until it says that it lives."""
    found = []
    for _ in range(STARTS):
        began_at = time.monotonic()
        with running(made.argv(1), made.log):
            until(lambda: alive(made.admin_port), "quantgate", made.log)
            found.append(time.monotonic() - began_at)
    return found


def scaling(made: Ours, seconds: float) -> list[Scaled]:
    """Plain requests a second with one worker and with two."""
    found = []
    for workers in (1, 2):
        with quantgate(made, workers) as contender:
            found.append(Scaled(workers, loaded(contender, PLAIN, seconds)))
    return found


def _run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)
