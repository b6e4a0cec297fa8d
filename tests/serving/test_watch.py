"""External replicas (`url`) of the configuration."""

import signal
from dataclasses import dataclass, field, replace

import pytest

from config.golden import GoldenAnswer
from serving.errors import ReplicaConflict
from serving.probe import Probe
from serving.registry import Registry
from serving.replica import Replica, State
from serving.tls import Tls
from serving.watch import Watch
from tests.fakes.running import running_fake
from tests.gateway.wire import answering, scripted, whole
from tests.serving.supervised import ready, until


async def test_external_replica_is_polled() -> None:
    """It is ready once it answers, with the model name that it serves, and failed when it is gone."""
    registry = Registry()
    async with running_fake(served="something") as fake, Probe() as probe:
        far = Replica("int4-1", "int4", "int4", fake.url, "int4")
        async with Watch((far,), registry, probe, every_seconds=0.02):
            assert (await ready(registry)).replica.served_name == "something"
            fake.process.send_signal(signal.SIGKILL)
            status = await until(registry, lambda status: status.state is State.FAILED)
            assert "is not healthy" in status.reason


async def test_wrong_api_key() -> None:
    """A replica that rejects the configured key is healthy but not ready."""
    registry = Registry()
    async with running_fake(env={"VLLM_API_KEY": "right"}) as fake, Probe() as probe:
        far = Replica("int4-1", "int4", "int4", fake.url, "int4", api_key="wrong")
        async with Watch((far,), registry, probe, every_seconds=0.02):
            status = await until(registry, lambda status: status.state is State.FAILED)
            assert "401" in status.reason


async def test_another_model_at_the_address() -> None:
    """A healthy replica with other log-probabilities of the golden prompt fails, and is checked only once."""
    registry = Registry()
    golden = GoldenAnswer((65, 66, 67), (-1.0, -1.0))  # the log-probabilities of the fake
    async with running_fake("--fake-logprob-shift", "0.3") as wrong, running_fake() as right, Probe() as probe:
        far = (Replica("a-1", "a", "int4", wrong.url, "a"), Replica("b-1", "b", "int4", right.url, "b"))
        async with Watch(far, registry, probe, {"a": golden, "b": golden}, every_seconds=0.02):
            status = await until(registry, lambda status: status.state is State.FAILED, "a-1")
            assert "is not a: golden prompt 0.300 nats" in status.reason
            await ready(registry, "b-1")
            await wrong.requested("/health", 20)
            assert len(wrong.requests("/v1/completions")) == 1


async def test_an_engine_without_prompt_logprobs() -> None:
    """Without support for log-probabilities of prompts, a replica is ready without the golden prompt check."""
    registry = Registry()
    golden = GoldenAnswer((65, 66, 67), (-1.0, -1.0))
    async with running_fake("--fake-fail-first", "1", "--fake-fail-status", "500") as fake, Probe() as probe:
        far = Replica("int4-1", "int4", "int4", fake.url, "int4")
        async with Watch((far,), registry, probe, {"int4": golden}, every_seconds=0.02):
            await ready(registry)


async def test_another_address_is_verified_anew() -> None:
    """A replica that was rejected becomes ready when the configuration points it to the right server."""
    registry = Registry()
    golden = GoldenAnswer((65, 66, 67), (-1.0, -1.0))
    async with running_fake("--fake-logprob-shift", "0.3") as wrong, running_fake() as right, Probe() as probe:
        far = Replica("int4-1", "int4", "int4", wrong.url, "int4")
        async with Watch((far,), registry, probe, {"int4": golden}, every_seconds=0.02) as watch:
            await until(registry, lambda status: "golden prompt" in status.reason)
            watch.add((replace(far, url=right.url),))
            assert (await ready(registry)).replica.url == right.url


@dataclass(slots=True)
class States:
    """The states that the replicas of a registry have been in, in order."""

    registry: Registry
    seen: list[State] = field(default_factory=list)

    def note(self) -> None:
        """Note the states that are new."""
        for status in self.registry.snapshot():
            if not self.seen or self.seen[-1] is not status.state:
                self.seen.append(status.state)


async def test_a_change_of_options_keeps_a_replica_ready() -> None:
    """It is the same server, and is verified again meanwhile."""
    registry = Registry()
    states = States(registry)
    async with running_fake() as fake, Probe() as probe:
        far = Replica("int4-1", "int4", "int4", fake.url, "int4")
        async with Watch((far,), registry, probe, every_seconds=0.02) as watch:
            await ready(registry)
            with registry.observed(states.note):
                watch.add((replace(far, max_in_flight=7),))
                await until(registry, lambda status: status.replica.max_in_flight == 7)
                await fake.requested("/v1/models", 2)
                watch.add((replace(far, max_in_flight=7, api_key="other"),))
                await until(registry, lambda status: status.replica.api_key == "other")
    assert states.seen == [State.READY]


@pytest.mark.parametrize("option", ["variant", "url"])
async def test_a_successor_takes_over_when_it_is_told_to(option: str) -> None:
    """Until then the replica is as ready as it was; the successor is verified, so it is ready at once."""
    registry = Registry()
    states = States(registry)
    async with running_fake() as left, running_fake() as right, Probe() as probe:
        far = Replica("one", "int4", "int4", left.url, "int4")
        successor = replace(far, url=right.url) if option == "url" else replace(far, variant="int8")
        async with Watch((far,), registry, probe, every_seconds=0.02) as watch:
            before = await ready(registry, "one")
            with registry.observed(states.note):
                watch.prepare((successor,))
                assert watch.leaving((successor,)) == {"one"}
                await until(watch.successors, lambda status: status.state is State.READY, "one")
                assert registry.status("one").replica == before.replica
                watch.keep_only((successor,))
                status = registry.status("one")
                assert (status.replica.url, status.replica.variant) == (successor.url, successor.variant)
                assert not watch.successors.snapshot()
                assert not watch.leaving((successor,))
                served = right if option == "url" else left
                await served.requested("/health", len(served.requests("/health")) + 3)
    assert states.seen == [State.READY]


async def test_a_change_that_is_undone() -> None:
    """The successor is forgotten, and the replica stays."""
    registry = Registry()
    async with running_fake() as fake, Probe() as probe:
        far = Replica("one", "int4", "int4", fake.url, "int4")
        async with Watch((far,), registry, probe, every_seconds=0.02) as watch:
            before = await ready(registry, "one")
            watch.prepare((replace(far, variant="int8"),))
            watch.prepare((far,))
            watch.keep_only((far,))
            assert not watch.successors.snapshot()
            assert registry.status("one") == before


async def test_a_successor_that_is_not_ready() -> None:
    """It takes over as it is, as the configuration says."""
    registry = Registry()
    async with running_fake() as fake, Probe() as probe:
        far = Replica("one", "int4", "int4", fake.url, "int4")
        async with Watch((far,), registry, probe, every_seconds=0.02) as watch:
            await ready(registry, "one")
            successor = replace(far, url="http://127.0.0.1:9")
            watch.prepare((successor,))
            await until(watch.successors, lambda status: status.state is State.FAILED, "one")
            watch.keep_only((successor,))
            assert registry.status("one").state is State.FAILED
            watch.add((far,))
            await ready(registry, "one")


@pytest.mark.parametrize(
    "models",
    [b'{"data": [{"id": "m"}, "x"]}', b'{"data": [{"id": 7}]}', b'{"data": []}', b"[]", b'"\xff"', b"[" * 100_000],
)
async def test_models_that_cannot_be_read(models: bytes) -> None:
    """The replica is not ready, and is asked again."""
    registry = Registry()
    healthy = whole(b"")
    replies = (healthy, whole(models), healthy, whole(models), healthy, whole(b'{"data": [{"id": "m"}]}'))
    async with scripted(answering(*replies, close=False)) as engine, Probe() as probe:
        far = Replica("int4-1", "int4", "int4", engine.url, "int4")
        async with Watch((far,), registry, probe, every_seconds=0.02):
            await until(registry, lambda status: "/v1/models answered something" in status.reason)
            await ready(registry)


@dataclass
class BrokenProbe(Probe):
    """A probe with a defect while `is_broken`."""

    is_broken: bool = True

    def __post_init__(self) -> None:
        super().__init__()

    async def healthy(self, url: str, tls: Tls | None = None) -> bool:
        """Fail, or ask."""
        if self.is_broken:
            raise AttributeError("'str' object has no attribute 'get'")
        return await super().healthy(url, tls)


async def test_a_defect_is_not_the_last_poll(caplog: pytest.LogCaptureFixture) -> None:
    """A replica whose poll has one gets no request; the log says so once, and polls go on."""
    registry = Registry()
    async with running_fake() as fake, BrokenProbe() as probe:
        far = Replica("int4-1", "int4", "int4", fake.url, "int4")
        async with Watch((far,), registry, probe, every_seconds=0.02):
            probe.is_broken = False
            await ready(registry)
            probe.is_broken = True
            await until(registry, lambda status: "its poll has a defect" in status.reason)
            probe.is_broken = False
            await ready(registry)
    assert [each for each in caplog.messages if "has a defect" in each]


async def test_id_of_another_source_is_a_conflict() -> None:
    """Nothing is polled if one id belongs to another source, whose replica stays as it is."""
    registry = Registry()
    own = Replica("int4-url-1", "int4-url", "int4", "http://127.0.0.1:1", "int4-url-1")
    registry.source("supervisor").put(own, State.READY)
    async with running_fake() as fake, Probe() as probe:
        far = tuple(Replica(f"int4-url-{number}", "int4", "int4", fake.url, "int4") for number in (2, 1))
        with pytest.raises(ReplicaConflict, match="'int4-url-1' belongs to the source 'supervisor'"):
            async with Watch(far, registry, probe, every_seconds=0.02):
                pass
        assert fake.requests("/v1/models") == []
    assert registry.status("int4-url-1").replica == own
    assert registry.status("int4-url-2").source == "configuration"


async def test_keep_only_removes_external_replicas_alone() -> None:
    """Those of other sources stay, whether they are listed or not."""
    registry = Registry()
    registry.source("supervisor").put(Replica("own-1", "own", "int4", "http://127.0.0.1:1", "own-1"), State.READY)
    async with running_fake() as fake, Probe() as probe:
        far = tuple(Replica(f"int4-{number}", "int4", "int4", fake.url, "int4") for number in (1, 2))
        async with Watch(far, registry, probe, every_seconds=0.02) as watch:
            await ready(registry, "int4-2")
            watch.keep_only(far[:1])
            assert [status.replica.id for status in registry.snapshot()] == ["int4-1", "own-1"]
            watch.add(far)
            await ready(registry, "int4-2")


async def test_whether_tools_are_taken() -> None:
    """An external replica is asked once, before it is ready, unless the configuration says; nothing is generated."""
    registry = Registry()
    async with running_fake() as takes, running_fake(tools=False) as refuses, Probe() as probe:
        far = (
            Replica("a-1", "a", "int4", takes.url, "a"),
            Replica("b-1", "b", "int4", refuses.url, "b"),
            Replica("c-1", "c", "int4", refuses.url, "c", tools=True),
        )
        async with Watch(far, registry, probe, every_seconds=0.02):
            found = [(await ready(registry, replica.id)).replica.tools for replica in far]
        assert found == [True, False, True]
        assert len(refuses.requests("/v1/messages/count_tokens")) == 1
        assert not takes.requests("/v1/chat/completions")


@pytest.mark.parametrize(
    "status, text, taken",
    [
        (b"200 OK", b"{}", True),
        (b"500 Internal Server Error", b"tools param requires --jinja flag", False),
        (b"503 Service Unavailable", b"no room", None),
    ],
)
async def test_tools_of_an_engine_that_cannot_count(status: bytes, text: bytes, taken: bool | None) -> None:
    """It is asked for one token of a chat; an answer about something else than tools tells nothing."""
    unknown = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
    answer = b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status, len(text), text)
    async with scripted(answering(unknown, answer)) as engine, Probe() as probe:
        assert await probe.takes_tools(Replica("a-1", "a", "int4", engine.url, "a")) is taken
