"""What shared limits of keys cost a gateway: leases of the state database, beside the `limits` library with Redis.

    python -m tests.benchmarks.shared_quotas                                    # starts a PostgreSQL of its own
    python -m tests.benchmarks.shared_quotas --redis redis://127.0.0.1:6379     # with `pip install limits[async-redis]`

Of a request: what a key with limits of requests, tokens and concurrency needs. Of a renewal: each second, in a thread.
"""

import argparse
import asyncio
import importlib
import resource
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial

from gateway.keys import Caller
from gateway.quota import Quota
from gateway.quota_shares import Limits, Use, changes
from serving.state.database import StateDatabase
from serving.state.quotas import QuotaTable
from tests.serving.state.databases import postgresql_programs, running_postgresql

REQUESTS = 20_000
HITS = 4_000
RENEWALS = 200
# One a request: requests per minute, and at its end tokens per minute; two for a counter of running requests.
HITS_PER_REQUEST = 4


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis", metavar="URL", help="measure the `limits` library, too")
    options = parser.parse_args()
    requests()
    programs = postgresql_programs()
    if programs is None:
        print("no PostgreSQL server is installed: renewals are not measured")
    else:
        with running_postgresql(programs) as server:
            for keys in (1, 20, 100):
                renewals(server.new_database(), keys)
    if options.redis:
        asyncio.run(redis(options.redis))


def cpu_seconds() -> float:
    """The CPU time of this process, all of its threads included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def requests() -> None:
    """Measure a request as the gateway counts it."""
    quota, caller = Quota(), Caller("key", requests_per_minute=10**9, tokens_per_minute=10**9, concurrency=10**6)
    before = cpu_seconds()
    for _ in range(REQUESTS):
        running = quota.start(caller)
        now = time.monotonic()
        counts = quota.admit(caller, now)
        assert running is not None
        assert counts is not None
        counts.charge(300, now)
        running.release()
    print(f"leases: {(cpu_seconds() - before) / REQUESTS * 1e6:.1f} us of CPU per request, nothing to wait for")


def renewals(url: str, keys: int) -> None:
    """Measure what a worker does each second, beside another worker with the same keys."""
    with ExitStack() as stack:
        database = StateDatabase.at(url)
        stack.callback(database.close)
        table = QuotaTable(database)
        report = {f"key-{number}": (Limits(600, 10**6, 10), Use(3, 3, 900, 1, 2)) for number in range(keys)}
        seconds = []
        for batch in range(1, 11):
            table.report("other", batch, partial(changes, worker="other", report=report))
        before = cpu_seconds()
        for batch in range(1, RENEWALS + 1):
            begun = time.perf_counter()
            table.report("own", batch, partial(changes, worker="own", report=report))
            seconds.append(time.perf_counter() - begun)
        cpu = (cpu_seconds() - before) / RENEWALS
        median = sorted(seconds)[RENEWALS // 2]
        print(f"leases: {cpu * 1e3:.1f} ms of CPU per renewal of {keys} keys, median {median * 1e3:.1f} ms")


async def redis(url: str) -> None:
    """Measure one call of the library, alone and with 32 at a time."""
    limits, storage = importlib.import_module("limits"), importlib.import_module("limits.aio.storage")
    strategies = importlib.import_module("limits.aio.strategies")
    item = limits.RateLimitItemPerMinute(10**9)
    for name in ("FixedWindowRateLimiter", "SlidingWindowCounterRateLimiter"):
        limiter = getattr(strategies, name)(storage.RedisStorage(f"async+{url}"))
        for at_once in (1, 32):
            await hits(name, partial(limiter.hit, item, "key"), at_once)


async def hits(name: str, hit: Callable[[], Awaitable[object]], at_once: int) -> None:
    """Print the CPU time of a call in this process and its latency, and what a request would need."""
    seconds: list[float] = []

    async def send(count: int) -> None:
        for _ in range(count):
            begun = time.perf_counter()
            await hit()
            seconds.append(time.perf_counter() - begun)

    await send(HITS // 10)  # connections and scripts
    seconds.clear()
    before = cpu_seconds()
    await asyncio.gather(*(send(HITS // at_once) for _ in range(at_once)))
    cpu = (cpu_seconds() - before) / len(seconds) * 1e6
    median, p99 = (sorted(seconds)[int(len(seconds) * share)] * 1e6 for share in (0.5, 0.99))
    print(
        f"{name}, {at_once} at once: {cpu:.0f} us of CPU per call, {HITS_PER_REQUEST * cpu:.0f} us per request; "
        f"latency of a call: median {median:.0f} us, p99 {p99:.0f} us"
    )


if __name__ == "__main__":
    main()
