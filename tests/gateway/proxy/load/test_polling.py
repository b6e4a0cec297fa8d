"""Replicas that are asked for their load: how often, and what becomes known when they don't answer."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from config.schema import ReplicaSettings
from gateway.observability.metrics import Metrics
from gateway.proxy.collectors import EngineCollector
from gateway.proxy.load.polling import (
    MetricsPoller,
    PollIntervals,
    first_poll_seconds,
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
IMPATIENT = PollIntervals(rest_seconds=0.02, busy_seconds=0.01, deadline_seconds=0.1)
NEVER_AT_REST = PollIntervals(rest_seconds=3600.0, busy_seconds=0.01, deadline_seconds=DEADLINE_SECONDS)


@dataclass(slots=True)
class Notes:
    """A listener that keeps what it hears; None stands for a load that was lost."""

    heard: list[tuple[str, EngineMetrics | None]] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)
    is_busy: bool = False
    more: asyncio.Event = field(default_factory=asyncio.Event)

    def busy(self, replica_id: str) -> bool:
        """Tell what the test says."""
        return self.is_busy

    def polled(self, replica_id: str, asked_at: float, poll: EngineMetrics) -> None:
        """Keep it."""
        self.asked.append(asked_at)
        self._hear(replica_id, poll)

    def lost(self, replica_id: str) -> None:
        """Keep it."""
        self._hear(replica_id, None)

    def _hear(self, replica_id: str, poll: EngineMetrics | None) -> None:
        self.heard.append((replica_id, poll))
        self.more.set()

    async def next(self, *, known: bool = True) -> EngineMetrics | None:
        """Wait for a poll that begins from now on: the first one heard may have been on its way."""
        begun = len(self.heard) + 1
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not (found := [poll for _, poll in self.heard[begun:] if (poll is not None) is known]):
                self.more.clear()
                await self.more.wait()
        return found[0]


@dataclass(slots=True)
class Polled:
    """Polling that runs, and everything around it."""

    notes: Notes
    registry: Registry
    pool: Pool
    metrics: Metrics
    polling: MetricsPoller

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
    """The tasks that poll."""
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("poll ")]


def replica(url: str, number: int = 1, **other: Any) -> Replica:
    """A replica of the variant `hi`."""
    return Replica(f"hi-{number}", "hi", "bf16", url, "m1", **other)


@asynccontextmanager
async def polling(*replicas: Replica, pace: PollIntervals = QUICK) -> AsyncIterator[Polled]:
    """Polling of ready replicas; nothing may be left of it."""
    notes, registry, metrics = Notes(), Registry(), Metrics()
    for each in replicas:
        registry.put(each, State.READY)
    async with Pool() as pool, MetricsPoller(registry, pool, notes, metrics.polls, Random(6), pace) as running:
        metrics.registry.register(EngineCollector(registry, lambda: running.seen))
        yield Polled(notes, registry, pool, metrics, running)
    assert not poll_tasks()
    assert repr(pool) == "<Pool []>"
    assert repr(running) == "<Polling 0 replicas>"


@pytest.mark.parametrize("jitter", [0.0, 0.3, 1.0])
async def test_intervals(jitter: float) -> None:
    """At least once a second, four times while busy, up to a fifth sooner; first polls are spread if they are many."""
    assert 0.8 <= next_poll_seconds(busy=False, jitter=jitter) <= 1.0
    assert 0.2 <= next_poll_seconds(busy=True, jitter=jitter) <= 0.25
    assert first_poll_seconds(1, jitter) <= 0.01
    assert first_poll_seconds(1000, jitter) == jitter


async def test_what_an_engine_says(fake: FakeReplica) -> None:
    """Polls tell the load of a replica that rests, and so do the metrics."""
    async with polling(replica(fake.url)) as polled:
        poll = await polled.notes.next()
        assert poll is not None
        assert (poll.running, poll.waiting, poll.kv_usage, poll.kv_capacity_tokens) == (0, 0, 0, 65536)
        assert poll.read_tokens is not None
        assert poll.generated_tokens is not None
        assert polled.notes.asked == sorted(polled.notes.asked)
        assert polled.notes.asked[-1] <= poll.at_seconds
        assert polled.polling.seen == {"hi-1": PollResult(poll, polled.notes.asked[-1], frozenset())}
        assert (polled.value("engine_requests", state="running"), polled.value("kv_usage_ratio")) == (0, 0)
        assert polled.value("engine_requests", state="waiting") == 0
        age = polled.value("poll_age_seconds")
        assert age is not None
        assert age >= 0
        assert [polled.value("metric_missing", metric=name.removeprefix("vllm:")) for name in WANTED] == [0] * 5
        assert (polled.value("polls_total", outcome="ok") or 0) >= 2
        assert polled.value("polls_total", outcome="failed") is None
        assert repr(polled.polling) == "<Polling 1 replicas>"


async def test_load_that_moves() -> None:
    """Who runs and who waits is seen, and so is that they have left."""
    flags = ("--max-num-seqs", "1", "--fake-stall-after-tokens", "0")
    async with (
        running_fake(*flags) as fake,
        polling(replica(fake.url)) as polled,
        httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as client,
    ):
        asking = [asyncio.create_task(client.post(fake.url + CHAT, json={**HELLO, "model": "m1"})) for _ in "12"]
        await heard(polled, lambda poll: (poll.running, poll.waiting, poll.kv_usage) == (1, 1, 1))
        assert polled.value("engine_requests", state="waiting") == 1
        fake.resume()
        await asyncio.gather(*asking)
        poll = await heard(polled, lambda poll: (poll.running, poll.waiting, poll.kv_usage) == (0, 0, 0))
        assert poll.generated_tokens == 32


async def heard(polled: Polled, wanted: Any) -> EngineMetrics:
    """The first poll from now on that is as wanted."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (poll := await polled.notes.next()) is None or not wanted(poll):
            pass
    return poll


async def test_busy_replicas_are_asked_more_often(fake: FakeReplica) -> None:
    """While a replica is busy the short interval counts, and no other one."""
    async with polling(replica(fake.url), pace=NEVER_AT_REST) as polled:
        polled.notes.is_busy = True
        for _ in range(3):
            assert await polled.notes.next()
    assert len(polled.notes.heard) >= 3


async def test_an_answer_that_does_not_come(caplog: pytest.LogCaptureFixture) -> None:
    """A page that hangs is a load that is lost, once per poll; it is known again when the page is there again."""
    async with running_fake() as fake, polling(replica(fake.url), pace=IMPATIENT) as polled:
        assert await polled.notes.next()
        await fake.change_metrics(stall=True)
        for _ in range(2):
            assert await polled.notes.next(known=False) is None
        assert polled.samples() == {"quantgate_replica_poll_age_seconds", "quantgate_replica_metric_missing"}
        seen = polled.polling.seen["hi-1"]
        assert (seen.poll, seen.answers) == (None, False)
        assert (polled.value("polls_total", outcome="failed") or 0) >= 2
        await fake.change_metrics()
        assert await polled.notes.next()
        assert polled.polling.seen["hi-1"].answers
    told = [(each.levelno, each.getMessage()) for each in caplog.records if "hi-1" in each.getMessage()]
    assert [level for level, _ in told] == [logging.WARNING], "once, however often it fails"
    assert "no whole page after 0.1 s" in told[0][1]


async def test_a_metric_with_another_name(caplog: pytest.LogCaptureFixture) -> None:
    """It raises an alarm, is logged once with its name, and is never zero; it is told when it is back."""
    caplog.set_level(logging.INFO, "gateway.proxy.load.polling")
    async with running_fake() as fake, polling(replica(fake.url)) as polled:
        assert await polled.notes.next()
        await fake.change_metrics(rename={RUNNING: "vllm:num_running", KV_USAGE: "vllm:gpu_cache_usage_perc"})
        for _ in range(2):
            assert await polled.notes.next(known=False) is None
        assert polled.value("metric_missing", metric="num_requests_running") == 1
        assert polled.value("metric_missing", metric="num_requests_waiting") == 0
        assert polled.value("engine_requests", state="running") is None
        assert polled.value("engine_requests", state="waiting") == 0
        assert polled.value("kv_usage_ratio") is None
        assert (polled.value("polls_total", outcome="missing") or 0) >= 2
        await fake.change_metrics()
        assert await polled.notes.next()
        assert polled.value("metric_missing", metric="num_requests_running") == 0
    told = Counter((each.levelno, each.getMessage()) for each in caplog.records)
    assert set(told.values()) == {1}
    for name in (RUNNING, KV_USAGE):
        assert [level for level, text in told if name in text] == [logging.WARNING, logging.INFO]
        assert all("hi-1" in text for _, text in told if name in text)


async def test_a_metric_that_nobody_decides_by_alone() -> None:
    """Without the KV usage the rest of the load is told all the same; the usage is unknown."""
    async with running_fake() as renaming, polling(replica(renaming.url)) as polled:
        await renaming.change_metrics(rename={KV_USAGE: "vllm:gpu_cache_usage_perc"})
        poll = await heard(polled, lambda poll: poll.kv_usage is None)
        assert (poll.running, poll.waiting) == (0, 0)
        assert polled.value("metric_missing", metric="kv_cache_usage_perc") == 1


@pytest.mark.parametrize(
    "behaviour",
    [
        answering(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"),
        answering(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nvllm"),
        answering(b"no HTTP\r\n\r\n"),
        answering(whole(b"x" * (4 * 2**20 + 1))),
        answering(whole(b"no metrics")),
    ],
    ids=["status", "cut off", "no HTTP", "too long", "another server"],
)
async def test_what_is_no_page(behaviour: Any) -> None:
    """Whatever else a server says, of its load nothing is known, and it is asked again."""
    async with scripted(behaviour, polled=True) as server, polling(replica(server.url)) as polled:
        for _ in range(2):
            assert await polled.notes.next(known=False) is None
    assert all(poll is None for _, poll in polled.notes.heard)


async def test_nobody_listens_and_then_somebody_does() -> None:
    """A replica that can't be reached is asked as often as any other."""
    async with scripted(answering(), polled=True) as gone:
        pass
    async with polling(replica(gone.url)) as polled:
        for _ in range(2):
            assert await polled.notes.next(known=False) is None
        assert polled.value("poll_age_seconds") is None
        assert polled.samples() == set(), "of whom nothing was ever known there is nothing to tell"
        async with running_fake("--port", gone.url.rpartition(":")[2]):
            assert await polled.notes.next()


async def test_who_leaves_is_not_asked_any_more() -> None:
    """The task and the connection of a replica end with it, in the middle of a poll or between two."""
    left = [asyncio.Event(), asyncio.Event()]

    async def patient(peer: Peer) -> None:
        await peer.request()
        await peer.say(whole(page_of(LOAD)))
        await peer.left()
        left[0].set()

    async def silent(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await peer.left()
        left[1].set()

    asked = asyncio.Event()
    async with (
        scripted(patient, polled=True) as one,
        scripted(silent, polled=True) as two,
        polling(replica(one.url), replica(two.url, 2), pace=NEVER_AT_REST) as polled,
    ):
        async with asyncio.timeout(DEADLINE_SECONDS):
            await asked.wait()
            await eventually(lambda: polled.polling.seen)
            polled.registry.remove("hi-1")
            polled.registry.move("hi-2", State.DRAINING)
            assert polled.polling.seen == {}
            assert polled.samples() == set()
            for each in left:
                await each.wait()
        assert repr(polled.polling) == "<Polling 0 replicas>"
        assert not poll_tasks()


async def test_a_replica_that_comes_back_as_another(fake: FakeReplica) -> None:
    """Another address under the same name is asked instead."""
    async with scripted(answering(), polled=True) as gone:
        pass
    async with polling(replica(gone.url)) as polled:
        assert await polled.notes.next(known=False) is None
        polled.registry.put(replica(fake.url), State.READY)
        polled.registry.put(replica("http://never-ready", 2), State.STARTING)
        assert await polled.notes.next()
    assert {replica_id for replica_id, _ in polled.notes.heard} == {"hi-1"}


async def test_over_tls(tmp_path: Path) -> None:
    """A replica is trusted as it is by requests; without that it can't be asked."""
    secure, page = Authority(tmp_path, "ca").issue().server_context(), whole(page_of(LOAD))
    settings = ReplicaSettings.model_validate({"variant": "hi", "url": "https://h", "ca": "ca.pem"})
    tls = read_tls((settings,), tmp_path)[0]
    async with scripted(answering(*[page] * 3, close=False), secure=secure, polled=True) as server:
        async with polling(replica(server.url, tls=tls)) as polled:
            poll = await polled.notes.next()
            assert poll is not None
            assert (poll.running, poll.waiting) == (3, 2)
        async with polling(replica(server.url)) as polled:
            assert await polled.notes.next(known=False) is None


async def test_a_key() -> None:
    """The request carries a replica's key, and nothing else that it need not."""
    async with Pool() as pool:
        assert metrics_request(replica("http://h:8000"), pool) == b"GET /metrics HTTP/1.1\r\nhost: h:8000\r\n\r\n"
        request = metrics_request(replica("unix:///a/socket", api_key="k"), pool)
        assert request == b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer k\r\n\r\n"


async def test_many(fake: FakeReplica) -> None:
    """Many replicas are polled at once, and none is left out."""
    many = [replica(fake.url, number) for number in range(50)]
    async with polling(*many) as polled:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while len({replica_id for replica_id, _ in polled.notes.heard}) < 50:
                await polled.notes.next()


async def test_a_mistake_of_ours(fake: FakeReplica, caplog: pytest.LogCaptureFixture) -> None:
    """A task that ends although nobody ended it is heard of at once."""

    class Broken(Notes):
        def polled(self, replica_id: str, asked_at: float, poll: EngineMetrics) -> None:
            raise ZeroDivisionError

    registry = Registry()
    registry.put(replica(fake.url), State.READY)
    async with Pool() as pool, MetricsPoller(registry, pool, Broken(), Metrics().polls, pace=QUICK):
        await eventually(lambda: "ZeroDivisionError" in caplog.text)
    assert "poll hi-1" in caplog.text
