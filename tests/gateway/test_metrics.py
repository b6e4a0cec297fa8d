"""What Prometheus gets."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from config.variant import QualityMeasures, Variant
from gateway.metrics import FIRST_TOKEN_SECONDS, UNKNOWN, FleetCollector, Metrics
from serving.registry import Registry
from serving.replica import Replica, State
from tests.fakes.running import FakeReplica
from tests.gateway.fleet import CONFIG, HELLO, STREAM, Fleet

pytestmark = pytest.mark.asyncio(loop_scope="session")

FAMILIES = {
    "quantgate_requests": "counter",
    "quantgate_tokens": "counter",
    "quantgate_retries": "counter",
    "quantgate_floor_rejections": "counter",
    "quantgate_requests_in_flight": "gauge",
    "quantgate_time_to_first_token_seconds": "histogram",
    "quantgate_inter_token_latency_seconds": "histogram",
    "quantgate_request_seconds": "histogram",
    "quantgate_queue_seconds": "histogram",
    "quantgate_overhead_seconds": "histogram",
    "quantgate_replica_state": "gauge",
    "quantgate_replica_state_seconds": "gauge",
    "quantgate_replica_in_flight": "gauge",
    "quantgate_variant_quality": "gauge",
    "quantgate_config_reloads": "counter",
}


async def test_every_metric_is_there(fleet: Fleet) -> None:
    """Names and kinds are a contract with dashboards; each has a help text."""
    answer = await fleet.admin.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    kinds = {name: family.type for name, family in families.items() if not name.endswith("_created")}
    assert kinds == FAMILIES
    assert all(family.documentation.endswith(".") for family in families.values())


async def test_labels_come_from_the_configuration(fleet: Fleet, fake: FakeReplica) -> None:
    """Whatever clients send, they can't make a label."""
    made_up = "made-up-by-a-client"
    with fleet.replicas(("hi", fake.url)):
        await fleet.ask()
        await fleet.ask(STREAM)
        await fleet.ask({**HELLO, "model": made_up})
        await fleet.ask({**HELLO, "model": f"smol/{made_up}", "user": made_up})
        await fleet.ask({**HELLO, "provider": {"quantizations": [made_up]}}, {"x-request-id": made_up})
        await fleet.ask({**HELLO, "max_tokens": made_up})
        await fleet.client.post(f"/v1/{made_up}")
        samples = await fleet.metrics()
    assert made_up not in str(samples)
    seen: dict[str, set[str]] = {}
    for _, labels in samples:
        for name, value in labels:
            seen.setdefault(name, set()).add(value)
    assert seen["alias"] <= {*CONFIG["aliases"], *CONFIG["variants"], UNKNOWN}
    assert seen["variant"] <= {*CONFIG["variants"], "none"}
    assert seen["precision"] <= {"bf16", "int8", "int4", "fp8", "none"}
    assert seen["endpoint"] <= {"chat.completions", "completions"}
    assert seen["reason"] <= {"preferred", "floor", "pinned", "fallback", "none"}
    assert seen["kind"] == {"prompt", "completion", "reasoning"}


async def test_counts_after_known_traffic(fleet: Fleet, fake: FakeReplica) -> None:
    """Three whole answers and two streams of four tokens are counted as just that."""
    served = {"alias": "mid", "variant": "mid", "precision": "int8"}
    names = ["request_seconds_count", "time_to_first_token_seconds_count", "inter_token_latency_seconds_count"]

    async def counts() -> list[float]:
        return [
            await fleet.total("quantgate_requests_total", **served, code="200", reason="pinned"),
            await fleet.total("quantgate_tokens_total", **served, kind="completion"),
            *[await fleet.total(f"quantgate_{name}", **served) for name in names],
            await fleet.total("quantgate_queue_seconds_count", alias="mid"),
            await fleet.total("quantgate_overhead_seconds_count"),
        ]

    before = await counts()
    with fleet.replicas(("mid", fake.url)):
        for body in (HELLO, HELLO, HELLO, STREAM, STREAM):
            await fleet.ask({**body, "model": "mid", "max_tokens": 4})
    grown = [after - earlier for after, earlier in zip(await counts(), before, strict=True)]
    assert grown == [5, 20, 5, 2, 6, 5, 5]


async def test_buckets_are_vllms(fleet: Fleet, fake: FakeReplica) -> None:
    """The edges are the engine's own, so that panels line up."""
    with fleet.replicas(("hi", fake.url)):
        await fleet.ask(STREAM)
    edges = {
        float(dict(labels)["le"])
        for name, labels in await fleet.metrics()
        if name == "quantgate_time_to_first_token_seconds_bucket"
    }
    assert edges == {*FIRST_TOKEN_SECONDS, float("inf")}


async def test_the_fleet_as_it_is_now() -> None:
    """State, load and quality are read when scraped: one state per replica is 1, and what is unknown is left out."""
    registry, metrics = Registry(), Metrics()
    variants = (
        Variant("hi", "bf16", QualityMeasures("parent", 0.0, 1.0, 1.0)),
        Variant("odd", "fp8", QualityMeasures("declared", kl_mean=0.02)),
    )
    metrics.registry.register(FleetCollector(registry, lambda: variants))
    registry.put(Replica("hi-1", "hi", "bf16", "http://x", "m1"), State.WARMING)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"quantgate_{name}", labels)

    names = {"replica": "hi-1", "variant": "hi", "precision": "bf16"}
    assert {state: value("replica_state", **names, state=state) for state in State if state is not State.WARMING} == {
        state: 0.0 for state in State if state is not State.WARMING
    }
    assert value("replica_state", **names, state="warming") == 1
    with registry.lease("hi-1"):
        assert value("replica_in_flight", **names) == 1
    assert value("replica_in_flight", **names) == 0
    age = value("replica_state_seconds", **names)
    assert age is not None
    assert age >= 0
    quality = {"variant": "odd", "precision": "fp8", "source": "declared"}
    assert value("variant_quality", **quality, measure="kl_mean") == 0.02
    assert value("variant_quality", **quality, measure="top1_agreement") is None
    registry.remove("hi-1")
    assert value("replica_state", **names, state="warming") is None
