"""Polls of replicas' metrics: how often, what they report, and what is known when they fail."""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from config.schema import ReplicaSettings
from gateway.observability.metrics import Metrics
from gateway.proxy.collectors import EngineCollector
from gateway.proxy.load.poll_share import PollReport, PollShare, descriptors_of, is_poller, poll_sockets
from gateway.proxy.load.polling import (
    MetricsPoller,
    PollIntervals,
    first_poll_seconds,
    intervals_of,
    metrics_request,
    next_poll_seconds,
)
from gateway.proxy.upstream.pool import Pool
from gateway.routing.engine_metrics import KV_USAGE, RUNNING, WANTED, EngineMetrics, PollResult
from serving.registry import Registry
from serving.replica import Replica, State
from serving.tls import read_tls
from tests.fakes.certificates import Authority
from tests.fakes.running import DEADLINE_SECONDS, FakeReplica, eventually, running_fake
from tests.gateway.fleet import CHAT, HELLO
from tests.gateway.handlers.pages import LOAD, page_of
from tests.gateway.wire import Peer, answering, scripted, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUICK = PollIntervals(rest_seconds=0.02, busy_seconds=0.01, deadline_seconds=DEADLINE_SECONDS)
SHORT_DEADLINE = PollIntervals(rest_seconds=0.02, busy_seconds=0.01, deadline_seconds=0.1)
NO_REPORTS = PollIntervals(
    rest_seconds=0.02, busy_seconds=0.01, report_timeout_seconds=0.05, deadline_seconds=DEADLINE_SECONDS
)
ONLY_WHILE_BUSY = PollIntervals(rest_seconds=3600.0, busy_seconds=0.01, deadline_seconds=DEADLINE_SECONDS)


@dataclass(slots=True)
class RecordingObserver:
    """Implements PollObserver: keeps the results; None is a poll that failed."""

    results: list[tuple[str, EngineMetrics | None]] = field(default_factory=list)
    polled_at: list[float] = field(default_factory=list)
    is_busy: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def busy(self, replica_id: str) -> bool:
        """Return what the test set."""
        return self.is_busy

    def polled(self, replica_id: str, polled_at: float, poll: EngineMetrics) -> None:
        """Keep a poll."""
        self.polled_at.append(polled_at)
        self._keep(replica_id, poll)

    def poll_failed(self, replica_id: str) -> None:
        """Keep a failure."""
        self._keep(replica_id, None)

    def _keep(self, replica_id: str, poll: EngineMetrics | None) -> None:
        self.results.append((replica_id, poll))
        self.changed.set()

    async def next(self, *, failed: bool = False) -> EngineMetrics | None:
        """Wait for a poll that is sent from now on; the first result may be of one that was under way."""
        start = len(self.results) + 1
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not (polls := [poll for _, poll in self.results[start:] if (poll is None) is failed]):
                self.changed.clear()
                await self.changed.wait()
        return polls[0]

    async def next_like(self, matches: Callable[[EngineMetrics], bool]) -> EngineMetrics:
        """Wait for the first poll from now on that matches."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while (poll := await self.next()) is None or not matches(poll):
                pass
        return poll


@dataclass(slots=True)
class PollerHarness:
    """A poller that runs, and what it works with."""

    observer: RecordingObserver
    registry: Registry
    pool: Pool
    metrics: Metrics
    poller: MetricsPoller

    def value(self, name: str, **labels: str) -> float | None:
        """One sample of /metrics."""
        named = {"replica": "hi-1", "variant": "hi", **labels}
        return self.metrics.registry.get_sample_value(f"quantgate_replica_{name}", named)

    def samples(self) -> set[str]:
        """The names of all samples of a replica's engine."""
        return {
            sample.name
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.labels.get("replica") == "hi-1" and "polls" not in sample.name
        }


def poll_tasks() -> list[str]:
    """The names of the tasks that poll."""
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("poll ")]


def replica(url: str, number: int = 1, **other: Any) -> Replica:
    """A replica of the variant `hi`."""
    return Replica(f"hi-{number}", "hi", "bf16", url, "m1", **other)


@asynccontextmanager
async def polling(
    *replicas: Replica, intervals: PollIntervals = QUICK, share: PollShare | None = None
) -> AsyncIterator[PollerHarness]:
    """Poll ready replicas; at the end no task and no connection may be left."""
    observer, registry, metrics = RecordingObserver(), Registry(), Metrics()
    for each in replicas:
        registry.put(each, State.READY)
    async with (
        Pool() as pool,
        MetricsPoller(registry, pool, observer, metrics.polls, Random(6), intervals, share=share) as poller,
    ):
        metrics.registry.register(EngineCollector(registry, lambda: poller.results))
        yield PollerHarness(observer, registry, pool, metrics, poller)
    assert share is not None or not poll_tasks()
    assert repr(pool) == "<Pool []>"
    assert repr(poller) == "<MetricsPoller 0 replicas>"


@pytest.mark.parametrize("jitter", [0.0, 0.3, 1.0])
async def test_intervals(jitter: float) -> None:
    """At least once a second, four times while busy, up to a fifth sooner; many first polls are spread."""
    assert 0.8 <= next_poll_seconds(busy=False, jitter=jitter) <= 1.0
    assert 0.2 <= next_poll_seconds(busy=True, jitter=jitter) <= 0.25
    assert first_poll_seconds(1, jitter) <= 0.01
    assert first_poll_seconds(1000, jitter) == jitter


@pytest.mark.parametrize("workers", [2, 4, 16])
@pytest.mark.parametrize("busy", [False, True])
async def test_workers_of_a_node_poll_a_replica_together_once_a_second(workers: int, busy: bool) -> None:
    """At most, that is at their shortest intervals, and one of them polls for all."""
    intervals = intervals_of(workers)
    assert next_poll_seconds(busy=busy, jitter=1.0, intervals=intervals) >= 1.0 - 1e-9
    assert [is_poller("hi-1", number + 1, workers) for number in range(workers)].count(True) == 1
    assert next_poll_seconds(busy=busy, jitter=0.0, intervals=intervals, answered=False) <= 1.0
    assert intervals_of(1) == PollIntervals()


@contextmanager
def poll_shares(workers: int) -> Iterator[list[PollShare]]:
    """The ends of so many workers, with descriptors of their own as in processes of their own."""
    pairs = poll_sockets(workers)
    try:
        yield [
            PollShare(place + 1, workers, [os.dup(each) for each in descriptors_of(place, pairs)])
            for place in range(workers)
        ]
    finally:
        for pair in pairs:
            for each in pair:
                each.close()


async def test_one_worker_polls_a_replica_for_all() -> None:
    """The others apply what it tells them, and count no polls."""
    async with running_fake() as fake, AsyncExitStack() as stack:
        shares = stack.enter_context(poll_shares(2))
        poller, other = sorted(shares, key=lambda share: not share.is_poller("hi-1"))
        async with (
            polling(replica(fake.url), intervals=SHORT_DEADLINE, share=poller) as own,
            polling(replica(fake.url), intervals=SHORT_DEADLINE, share=other) as told,
        ):
            polls = [await told.observer.next() for _ in range(3)]
            assert all(polls)
            assert set(told.observer.polled_at) <= set(own.observer.polled_at)
            assert told.value("polls_total", outcome="ok") is None
            await fake.change_metrics(stall=True)
            assert await told.observer.next(failed=True) is None


async def test_a_worker_that_gets_no_answers(fake: FakeReplica) -> None:
    """It may have no file descriptor left: the others poll by themselves, and do not call the replica silent."""
    with ExitStack() as stack:
        shares = stack.enter_context(poll_shares(2))
        poller, other = sorted(shares, key=lambda share: not share.is_poller("hi-1"))
        async with (
            polling(replica("http://127.0.0.1:1"), intervals=NO_REPORTS, share=poller) as broken,
            polling(replica(fake.url), intervals=NO_REPORTS, share=other) as own,
        ):
            for _ in range(3):
                await broken.observer.next(failed=True)
                assert await own.observer.next()
            assert all(poll for _, poll in own.observer.results)


async def test_a_worker_that_is_told_nothing_polls_by_itself(fake: FakeReplica) -> None:
    """As long as the poller of a replica is away."""
    with poll_shares(2) as shares:
        poller, other = sorted(shares, key=lambda share: not share.is_poller("hi-1"))
        async with polling(replica(fake.url), intervals=NO_REPORTS, share=other) as alone:
            assert await alone.observer.next()
            assert (alone.value("polls_total", outcome="ok") or 0) > 0
        with poller:  # ends its descriptors
            pass


async def test_reports_to_a_worker_that_is_gone() -> None:
    """They are dropped, however many they are: it is restarted, and the poller goes on."""
    own, told = poll_sockets(2)
    share = PollShare(1, 2, [os.dup(own[0].fileno()), os.dup(told[1].fileno())])
    for each in (*own, *told):
        each.close()
    with share:
        for _ in range(2):
            share.send(PollReport("hi-1", 0.0, answered=False))


async def test_a_replica_that_does_not_answer_is_polled_sooner() -> None:
    """It must be known to hang within seconds, however many workers share its polls."""
    rare = PollIntervals(rest_seconds=1000.0, busy_seconds=1000.0, unanswered_seconds=0.01, deadline_seconds=0.02)
    async with running_fake() as fake:
        await fake.change_metrics(stall=True)
        async with polling(replica(fake.url), intervals=rare) as harness:
            for _ in range(3):
                assert await harness.observer.next(failed=True) is None


async def test_an_idle_engine(fake: FakeReplica) -> None:
    """Polls and the gateway's own metrics have the load of an idle replica."""
    async with polling(replica(fake.url)) as harness:
        poll = await harness.observer.next()
        assert poll is not None
        assert (poll.running, poll.waiting, poll.kv_usage, poll.kv_capacity_tokens) == (0, 0, 0, 65536)
        assert poll.read_tokens is not None
        assert poll.generated_tokens is not None
        assert harness.observer.polled_at == sorted(harness.observer.polled_at)
        assert harness.observer.polled_at[-1] <= poll.at_seconds
        assert harness.poller.results == {"hi-1": PollResult(poll, harness.observer.polled_at[-1], frozenset())}
        assert (harness.value("engine_requests", state="running"), harness.value("kv_usage_ratio")) == (0, 0)
        assert harness.value("engine_requests", state="waiting") == 0
        age = harness.value("poll_age_seconds")
        assert age is not None
        assert age >= 0
        assert [harness.value("metric_missing", metric=name.removeprefix("vllm:")) for name in WANTED] == [0] * 5
        assert (harness.value("polls_total", outcome="ok") or 0) >= 2
        assert harness.value("polls_total", outcome="failed") == 0
        assert repr(harness.poller) == "<MetricsPoller 1 replicas>"


async def test_a_changing_load() -> None:
    """Polls show requests that run and wait, and that they have ended."""
    flags = ("--max-num-seqs", "1", "--fake-stall-after-tokens", "0")
    async with (
        running_fake(*flags) as fake,
        polling(replica(fake.url)) as harness,
        httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as client,
    ):
        requests = [asyncio.create_task(client.post(fake.url + CHAT, json={**HELLO, "model": "m1"})) for _ in "12"]
        await harness.observer.next_like(lambda poll: (poll.running, poll.waiting, poll.kv_usage) == (1, 1, 1))
        assert harness.value("engine_requests", state="waiting") == 1
        fake.resume()
        await asyncio.gather(*requests)
        poll = await harness.observer.next_like(lambda poll: (poll.running, poll.waiting, poll.kv_usage) == (0, 0, 0))
        assert poll.generated_tokens == 32


async def test_busy_replicas_are_polled_more_often(fake: FakeReplica) -> None:
    """Only the short interval counts while a replica is busy."""
    async with polling(replica(fake.url), intervals=ONLY_WHILE_BUSY) as harness:
        harness.observer.is_busy = True
        for _ in range(3):
            assert await harness.observer.next()
    assert len(harness.observer.results) >= 3


async def test_a_page_that_does_not_arrive(caplog: pytest.LogCaptureFixture) -> None:
    """Each poll fails at its deadline, which is logged once; the next page that arrives is used."""
    async with running_fake() as fake, polling(replica(fake.url), intervals=SHORT_DEADLINE) as harness:
        assert await harness.observer.next()
        await fake.change_metrics(stall=True)
        for _ in range(2):
            assert await harness.observer.next(failed=True) is None
        assert harness.samples() == {"quantgate_replica_poll_age_seconds", "quantgate_replica_metric_missing"}
        result = harness.poller.results["hi-1"]
        assert (result.poll, result.answers) == (None, False)
        assert (harness.value("polls_total", outcome="failed") or 0) >= 2
        await fake.change_metrics()
        assert await harness.observer.next()
        assert harness.poller.results["hi-1"].answers
    lines = [(each.levelno, each.getMessage()) for each in caplog.records if "hi-1" in each.getMessage()]
    assert [level for level, _ in lines] == [logging.WARNING], "once, however often it fails"
    assert "no complete page after 0.1 s" in lines[0][1]


async def test_a_missing_metric(caplog: pytest.LogCaptureFixture) -> None:
    """It is exported as missing, never as zero; that it is missing, and that it is back, is logged once."""
    caplog.set_level(logging.INFO, "gateway.proxy.load.polling")
    async with running_fake() as fake, polling(replica(fake.url)) as harness:
        assert await harness.observer.next()
        await fake.change_metrics(rename={RUNNING: "vllm:num_running", KV_USAGE: "vllm:gpu_cache_usage_perc"})
        for _ in range(2):
            assert await harness.observer.next(failed=True) is None
        assert harness.value("metric_missing", metric="num_requests_running") == 1
        assert harness.value("metric_missing", metric="num_requests_waiting") == 0
        assert harness.value("engine_requests", state="running") is None
        assert harness.value("engine_requests", state="waiting") == 0
        assert harness.value("kv_usage_ratio") is None
        assert (harness.value("polls_total", outcome="missing") or 0) >= 2
        await fake.change_metrics()
        assert await harness.observer.next()
        assert harness.value("metric_missing", metric="num_requests_running") == 0
    lines = Counter((each.levelno, each.getMessage()) for each in caplog.records)
    assert set(lines.values()) == {1}
    for name in (RUNNING, KV_USAGE):
        assert [level for level, text in lines if name in text] == [logging.WARNING, logging.INFO]
        assert all("hi-1" in text for _, text in lines if name in text)


async def test_a_missing_kv_usage() -> None:
    """The rest of the load is reported all the same; the usage is unknown."""
    async with running_fake() as renamed, polling(replica(renamed.url)) as harness:
        await renamed.change_metrics(rename={KV_USAGE: "vllm:gpu_cache_usage_perc"})
        poll = await harness.observer.next_like(lambda poll: poll.kv_usage is None)
        assert (poll.running, poll.waiting) == (0, 0)
        assert harness.value("metric_missing", metric="kv_cache_usage_perc") == 1


@pytest.mark.parametrize(
    "behaviour",
    [
        answering(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"),
        answering(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nvllm"),
        answering(b"no HTTP\r\n\r\n"),
        answering(whole(b"x" * (4 * 2**20 + 1))),
        answering(whole(b"no metrics")),
    ],
    ids=["status", "cut off", "not HTTP", "too long", "another server"],
)
async def test_invalid_pages(behaviour: Any) -> None:
    """The load is unknown, and polls go on."""
    async with scripted(behaviour, polled=True) as server, polling(replica(server.url)) as harness:
        for _ in range(2):
            assert await harness.observer.next(failed=True) is None
    assert all(poll is None for _, poll in harness.observer.results)


async def test_an_unreachable_replica() -> None:
    """It is polled as often as any other, and used when it can be reached."""
    async with scripted(answering(), polled=True) as gone:
        pass
    async with polling(replica(gone.url)) as harness:
        for _ in range(2):
            assert await harness.observer.next(failed=True) is None
        assert harness.value("poll_age_seconds") is None
        assert harness.samples() == set(), "nothing was ever known of it"
        async with running_fake("--port", gone.url.rpartition(":")[2]):
            assert await harness.observer.next()


async def test_a_replica_that_leaves() -> None:
    """Its task and its connection end, during a poll or between two."""
    left = [asyncio.Event(), asyncio.Event()]

    async def replies(peer: Peer) -> None:
        await peer.request()
        await peer.say(whole(page_of(LOAD)))
        await peer.left()
        left[0].set()

    async def silent(peer: Peer) -> None:
        await peer.request()
        requested.set()
        await peer.left()
        left[1].set()

    requested = asyncio.Event()
    async with (
        scripted(replies, polled=True) as one,
        scripted(silent, polled=True) as two,
        polling(replica(one.url), replica(two.url, 2), intervals=ONLY_WHILE_BUSY) as harness,
    ):
        async with asyncio.timeout(DEADLINE_SECONDS):
            await requested.wait()
            await eventually(lambda: harness.poller.results)
            harness.registry.remove("hi-1")
            harness.registry.move("hi-2", State.DRAINING)
            assert harness.poller.results == {}
            assert harness.samples() == set()
            for each in left:
                await each.wait()
        assert repr(harness.poller) == "<MetricsPoller 0 replicas>"
        assert not poll_tasks()


async def test_a_replica_that_comes_back_as_another(fake: FakeReplica) -> None:
    """Another url under the same id is polled instead."""
    async with scripted(answering(), polled=True) as gone:
        pass
    async with polling(replica(gone.url)) as harness:
        assert await harness.observer.next(failed=True) is None
        harness.registry.put(replica(fake.url), State.READY)
        harness.registry.put(replica("http://never-ready", 2), State.STARTING)
        assert await harness.observer.next()
    assert {replica_id for replica_id, _ in harness.observer.results} == {"hi-1"}


async def test_tls(tmp_path: Path) -> None:
    """Polls use the TLS settings of the replica; without them they fail."""
    secure, page = Authority(tmp_path, "ca").issue().server_context(), whole(page_of(LOAD))
    settings = ReplicaSettings.model_validate({"variant": "hi", "url": "https://h", "ca": "ca.pem"})
    tls = read_tls((settings,), tmp_path)[0]
    async with scripted(answering(*[page] * 3, close=False), secure=secure, polled=True) as server:
        async with polling(replica(server.url, tls=tls)) as harness:
            poll = await harness.observer.next()
            assert poll is not None
            assert (poll.running, poll.waiting) == (3, 2)
        async with polling(replica(server.url)) as harness:
            assert await harness.observer.next(failed=True) is None


async def test_the_request() -> None:
    """It has the key of the replica, and no header that is not needed."""
    async with Pool() as pool:
        assert metrics_request(replica("http://h:8000"), pool) == b"GET /metrics HTTP/1.1\r\nhost: h:8000\r\n\r\n"
        request = metrics_request(replica("unix:///a/socket", api_key="k"), pool)
        assert request == b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer k\r\n\r\n"


async def test_many_replicas(fake: FakeReplica) -> None:
    """All of them are polled."""
    many = [replica(fake.url, number) for number in range(50)]
    async with polling(*many) as harness:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while len({replica_id for replica_id, _ in harness.observer.results}) < 50:
                await harness.observer.next()


async def test_an_error_of_an_observer(fake: FakeReplica, caplog: pytest.LogCaptureFixture) -> None:
    """A task that ends with an exception is logged at once."""

    class Broken(RecordingObserver):
        def polled(self, replica_id: str, polled_at: float, poll: EngineMetrics) -> None:
            raise ZeroDivisionError

    registry = Registry()
    registry.put(replica(fake.url), State.READY)
    async with Pool() as pool, MetricsPoller(registry, pool, Broken(), Metrics().polls, intervals=QUICK):
        await eventually(lambda: "ZeroDivisionError" in caplog.text)
    assert "poll hi-1" in caplog.text
