"""Metrics for whoever runs a gateway: series that exist at 0, connections, API keys, certificates, the process."""

import datetime as dt
import json
from hashlib import sha256
from pathlib import Path

import pytest

from config.schema import ReplicaSettings
from gateway.errors import QueueFull, RateLimited
from gateway.keys import StoredKey, keys_in_force
from gateway.observability.metrics import UNKNOWN, FleetCollector, Metrics
from gateway.observability.metrics.instruments import Counter, Family
from gateway.proxy.initial_series import create_series, rejection_reasons
from gateway.routing.target import Catalog
from serving.registry import Registry
from serving.replica import Replica, State
from serving.tls import read_tls
from tests.fakes.certificates import DAY, Authority
from tests.fakes.running import FakeReplica, eventually, running_fake
from tests.gateway.fleet import CHAT, CONFIG, HELLO, Fleet, deployment, running_gateway
from tests.gateway.wire import connected

pytestmark = pytest.mark.asyncio(loop_scope="session")

KEY = "qg-alice"
KEYS = keys_in_force({"alice": StoredKey(sha256=(sha256(KEY.encode()).hexdigest(),))})


async def test_counters_of_every_alias_exist_before_the_first_request() -> None:
    """An alias' first request, spill, rejection and retry are steps from 0, which `increase` sees."""
    async with running_gateway(deployment()) as fleet:
        samples = await fleet.metrics()

    def zeros(name: str, **labels: str) -> int:
        wanted = set(labels.items())
        found = [value for (each, having), value in samples.items() if each == f"quantgate_{name}" and wanted <= having]
        assert not any(found)
        return len(found)

    for alias, rungs in (("smol", 3), ("strict", 2), ("team/small", 1), ("hopeless", 0)):
        assert zeros("requests_total", alias=alias, endpoint="chat.completions", code="200") == rungs
        assert zeros("tokens_total", alias=alias) == 3 * rungs
        assert zeros("spills_total", alias=alias) == max(rungs - 1, 0)
        assert zeros("ladder_spilling", alias=alias) == max(rungs - 1, 0)
        assert zeros("ladder_switches_total", alias=alias) == 2 * max(rungs - 1, 0)
        assert zeros("session_moves_total", alias=alias) == (2 if rungs > 1 else 0)
        assert zeros("floor_rejections_total", alias=alias) == 1
        assert zeros("retries_total", alias=alias, code="upstream_disconnected") == 1
        assert zeros("retries_refused_total", alias=alias) == 3
        assert zeros("rollout_rollbacks_total", alias=alias) == 7
        assert zeros("waiting", alias=alias) == 1
        assert zeros("rejections_total", alias=alias) == len(rejection_reasons())
    assert zeros("rejections_total", alias=UNKNOWN) == len(rejection_reasons())
    assert zeros("config_reloads_total") == 3
    assert zeros("clients_cut_total") == 1
    assert {QueueFull.metric_reason, RateLimited.metric_reason, "floor", "other"} < rejection_reasons()


async def test_series_keep_their_values_at_a_reload() -> None:
    """What has been counted stays when the series of a new configuration are created."""
    metrics, settings = Metrics(), deployment()
    catalog = Catalog(settings.settings.aliases, settings.variants)
    metrics.floor_rejections.labels("smol").inc()
    create_series(metrics, catalog)
    create_series(metrics, catalog)
    assert metrics.floor_rejections.labels("smol").value == 1


async def test_a_large_configuration_leaves_room_for_what_occurs() -> None:
    """Series at 0 use half of a family's children at most."""
    family = Family(("alias",), Counter, 10)
    for number in range(20):
        family.exists(f"configured-{number}")
    assert len(family.children) == 5
    assert family.labels("occurs") is not family.labels("configured-19")


async def test_requests_by_key_are_off_by_default(fake: FakeReplica) -> None:
    """Without gateway.per_key_metrics no series names a key."""
    async with running_gateway(deployment(keys=KEYS)) as fleet:
        with fleet.replicas(("hi", fake.url)):
            assert (await fleet.ask(headers={"authorization": f"Bearer {KEY}"})).status_code == 200
        assert not await fleet.metrics("quantgate_key_")


async def test_requests_by_key(fake: FakeReplica) -> None:
    """With gateway.per_key_metrics requests and tokens are counted by the key's name, from 0."""
    changes = {"gateway": {**CONFIG["gateway"], "per_key_metrics": True}}
    async with running_gateway(deployment(changes, KEYS)) as fleet:
        assert await fleet.metrics("quantgate_key_requests_total") == {
            ("quantgate_key_requests_total", frozenset({("key", "alice"), ("code", "200")})): 0
        }
        with fleet.replicas(("hi", fake.url)):
            answer = await fleet.ask(headers={"authorization": f"Bearer {KEY}"})
            await fleet.ask(headers={"authorization": "Bearer made-up"})
        usage = answer.json()["usage"]
        assert await fleet.total("quantgate_key_requests_total", key="alice", code="200") == 1
        assert await fleet.total("quantgate_key_tokens_total", key="alice", kind="prompt") == usage["prompt_tokens"]
        assert (
            await fleet.total("quantgate_key_tokens_total", key="alice", kind="completion")
            == usage["completion_tokens"]
        )
        # A key that is not known has no name, and no series of its own.
        names = {dict(labels)["key"] for _, labels in await fleet.metrics("quantgate_key_")}
        assert names <= {"alice", "none"}


async def test_connections_and_bodies() -> None:
    """A connection is active while its request is answered, and idle before and after; so is its body's memory."""
    async with running_fake("--fake-stall-before-first-byte") as stalled, running_gateway(deployment()) as fleet:
        body = json.dumps({**HELLO, "model": "hi"}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        with fleet.replicas(("hi", stalled.url)):
            async with connected(fleet.url) as peer:
                await eventually(lambda: fleet.served.server.connections == 1 or None)
                assert await connections(fleet) == (0, 1, 0)
                await peer.say(head.encode() + body)
                await stalled.requested(CHAT)
                assert await connections(fleet) == (1, 0, len(body))
            await eventually(lambda: fleet.served.server.connections == 0 or None)
            assert await connections(fleet) == (0, 0, 0)


async def connections(fleet: Fleet) -> tuple[float, float, float]:
    """Active and idle connections, and the memory of bodies, as the metrics report them."""
    return (
        await fleet.total("quantgate_client_connections", state="active"),
        await fleet.total("quantgate_client_connections", state="idle"),
        await fleet.total("quantgate_request_body_bytes"),
    )


async def test_certificates_that_expire(tmp_path: Path) -> None:
    """The expiry of each configured PEM file is a timestamp; a file with several certificates counts by the first."""
    authority = Authority(tmp_path, "ca")
    short, long = authority.issue(valid_for=2 * DAY), authority.issue(valid_for=30 * DAY)
    chain = tmp_path / "chain.pem"
    chain.write_bytes(long.certificate.read_bytes() + short.certificate.read_bytes())
    options = {"ca": "ca.pem", "certificate": "chain.pem", "key_file": long.key.name}
    settings = ReplicaSettings.model_validate({"variant": "hi", "url": "https://h", **options})
    registry, metrics = Registry(), Metrics()
    metrics.registry.register(FleetCollector(registry, list))
    tls = read_tls((settings,), tmp_path)[0]
    registry.put(Replica("hi-url-1", "hi", "bf16", "https://h", "m", tls=tls), State.READY)

    def days_left(file: str) -> int:
        name = "quantgate_certificate_expiration_timestamp_seconds"
        seconds = metrics.registry.get_sample_value(name, {"file": file})
        assert seconds is not None
        return round((seconds - dt.datetime.now(dt.UTC).timestamp()) / DAY.total_seconds())

    assert (days_left("ca.pem"), days_left("chain.pem")) == (1, 2)


async def test_every_outcome_of_polls_exists_with_the_first(fleet: Fleet, fake: FakeReplica) -> None:
    """A poll that fails later is a step from 0."""
    name = "quantgate_replica_polls_total"
    with fleet.replicas(("mid", fake.url)):
        await eventually(lambda: fleet.total(name, replica="mid-0", outcome="ok"))
        samples = await fleet.metrics(name)
    outcomes = {dict(labels)["outcome"] for _, labels in samples if dict(labels)["replica"] == "mid-0"}
    assert outcomes == {"ok", "missing", "failed"}


async def test_the_process(fleet: Fleet) -> None:
    """CPU, memory and file descriptors of the process have the names of every Prometheus client."""
    samples = {name: value for (name, _), value in (await fleet.metrics("process_")).items()}
    assert {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"} < set(samples)
    assert samples["process_open_fds"] < samples["process_max_fds"]
