"""What Prometheus gets."""

import asyncio
import time
from itertools import product

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from config.variant import MEASURES, PARENT_QUALITY, QualityMeasures, Variant
from gateway.observability.metrics import FIRST_TOKEN_SECONDS, UNKNOWN, FleetCollector, Histogram, LoopLag, Metrics
from gateway.observability.metrics.catalogue import REJECTIONS
from gateway.observability.metrics.exposition import exposition
from gateway.observability.metrics.fleet import BREAKER_STATES
from gateway.openai.usage import Usage
from gateway.proxy.stats import RequestStats
from gateway.routing.latency import LatencyEstimate
from gateway.routing.pick import Candidate, Reason
from serving.registry import Registry
from serving.replica import Replica, State
from tests.fakes.running import FakeReplica, eventually
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
    "quantgate_waiting": "gauge",
    "quantgate_rejections": "counter",
    "quantgate_spills": "counter",
    "quantgate_retries_refused": "counter",
    "quantgate_client_retries": "counter",
    "quantgate_heartbeats": "counter",
    "quantgate_clients_cut": "counter",
    "quantgate_access_log_lines_dropped": "counter",
    "quantgate_event_loop_lag_seconds": "histogram",
    "quantgate_build_info": "gauge",
    "quantgate_replica_breaker": "gauge",
    "quantgate_replica_polls": "counter",
    "quantgate_replica_poll_age_seconds": "gauge",
    "quantgate_replica_metric_missing": "gauge",
    "quantgate_replica_engine_requests": "gauge",
    "quantgate_replica_kv_usage_ratio": "gauge",
    "quantgate_replica_load_unknown": "gauge",
    "quantgate_replica_wait_seconds": "gauge",
    "quantgate_ladder_spilling": "gauge",
    "quantgate_ladder_switches": "counter",
    "quantgate_session_moves": "counter",
}
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


async def test_every_metric_is_there(fleet: Fleet) -> None:
    """Names and kinds are a contract with dashboards; each has a help text."""
    answer = await fleet.admin.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert {name: family.type for name, family in families.items()} == FAMILIES
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
    answered = {"preferred", "spill", "floor", "pinned", "fallback", "none"}
    assert seen["reason"] <= {*answered, *REJECTIONS, "other", "poison", "attempts", "budget"}
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
        Variant("hi", "bf16", PARENT_QUALITY),
        Variant("odd", "fp8", QualityMeasures("declared", kl_mean=0.02)),
    )
    metrics.registry.register(FleetCollector(registry, lambda: variants, lambda: {"hi-1": "half_open"}))
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
    breaker = {state: value("replica_breaker", replica="hi-1", variant="hi", state=state) for state in BREAKER_STATES}
    assert breaker == {"closed": 0, "half_open": 1, "open": 0}
    quality = {"variant": "odd", "precision": "fp8", "source": "declared"}
    assert value("variant_quality", **quality, measure="kl_mean") == 0.02
    assert value("variant_quality", **quality, measure="top1_agreement") is None
    perfect = {"variant": "hi", "precision": "bf16", "source": "parent"}
    assert [value("variant_quality", **perfect, measure=measure) for measure in MEASURES] == [1, 0, 1, 0, 1]
    registry.remove("hi-1")
    assert value("replica_state", **names, state="warming") is None


async def test_exemplars_for_who_can_read_them(fleet: Fleet, fake: FakeReplica) -> None:
    """OpenMetrics, asked for as Prometheus does, names the last request of a bucket."""
    with fleet.replicas(("lo", fake.url)):
        await fleet.ask({**STREAM, "model": "lo"}, {"x-request-id": "slow-one"})
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
    answer = await fleet.admin.get("/metrics", headers={"accept": accept})
    assert answer.headers["content-type"].startswith(OPENMETRICS)
    told = [
        sample.name
        for family in openmetrics_families(answer.text)  # type: ignore[no-untyped-call]
        for sample in family.samples
        if sample.labels.get("alias") == "lo"
        and sample.exemplar
        and sample.exemplar.labels == {"request_id": "slow-one"}
    ]
    # Other tests' requests are in other buckets; each figure of this one is in a single bucket, which it came to last.
    names = ("time_to_first_token", "request", "queue")
    assert sorted(told) == sorted(f"quantgate_{name}_seconds_bucket" for name in names)
    assert "_created" not in answer.text


async def test_series_budget() -> None:
    """10 aliases of 5 variants with 20 replicas each make less than 20,000 series, whatever has happened."""
    metrics, registry = Metrics(), Registry()
    variants = [Variant(f"v{number}", "int8", QualityMeasures("measured", 0.1, 0.9, 1.1)) for number in range(5)]
    metrics.registry.register(FleetCollector(registry, lambda: variants))
    for variant, number in product(variants, range(20)):
        registry.put(Replica(f"{variant.name}-{number}", variant.name, "int8", "http://x", "m"), State.READY)
    for alias in (*(f"a{number}" for number in range(10)), *(variant.name for variant in variants), UNKNOWN):
        everything_happens(metrics, alias, variants)
    for reason in ("slow_reader", "idle", "drain", "too_large"):
        metrics.clients_cut.labels(reason).inc()
    for outcome in ("applied", "refused", "failed"):
        metrics.reloads.labels(outcome).inc()
    page = await exposition(metrics.registry, "")
    lines = [line for line in page.body.decode().splitlines() if not line.startswith("#")]
    assert 10_000 < len(lines) < 20_000
    assert not any('"_other"' in line for line in lines)


ANSWERED = ("200", "400", "413", "422", "499", "502", "503", "504", "upstream_error", "upstream_disconnected")
UNANSWERED = ("400", "401", "403", "404", "408", "413", "429", "431", "499", "500", "502", "503", "504")


def everything_happens(metrics: Metrics, alias: str, variants: list[Variant]) -> None:
    """Every end of a request for an alias, or for a variant that is named itself, that can occur."""
    pinned = any(variant.name == alias for variant in variants)
    answering = [] if alias == UNKNOWN else [each for each in variants if not pinned or each.name == alias]
    endings: list[tuple[Variant, Reason]] = []
    for rung, variant in enumerate(answering):
        endings += [(variant, reason) for reason in reasons(rung, pinned=pinned)]
    for endpoint in ("chat.completions", "completions"):
        for code in UNANSWERED:
            ended(metrics, alias, endpoint, code, None)
        for (variant, reason), code in product(endings, ANSWERED):
            replica = LatencyEstimate("r", variant.name, True, True, True, False, 0, 0.0)
            ended(metrics, alias, endpoint, code, Candidate(replica, variant, reason))
    for why in REJECTIONS:
        metrics.rejected(alias, why)
    for code in ("overloaded", "upstream_error", "upstream_unreachable", "upstream_disconnected", "upstream_timeout"):
        metrics.retries.labels(alias, code).inc()
    for variant in answering[1:]:
        metrics.spills.labels(alias, variant.name).inc()
    metrics.floor_rejections.labels(alias).inc()


def reasons(rung: int, *, pinned: bool) -> tuple[Reason, ...]:
    """Why a rung may answer."""
    if pinned:
        return ("pinned",)
    return ("floor", "fallback", "spill", "canary") if rung else ("preferred", "canary")


def ended(metrics: Metrics, alias: str, endpoint: str, code: str, candidate: Candidate | None) -> None:
    """One request from its beginning to its end."""
    with RequestStats(metrics, lambda *_: None, endpoint, "r") as account:
        account.alias, account.code = alias, code
        if candidate is not None:
            account.attempt(candidate)
            account.sent()
            account.token()
            account.token()
            account.usage = Usage(1, 2)


async def test_a_reason_that_somebody_made_up() -> None:
    """An engine's own word for an error is no label."""
    metrics = Metrics()
    metrics.rejected("smol", "queue_full")
    metrics.rejected("smol", "made up by an engine")
    told = {reason: metrics.rejections.labels("smol", reason).value for reason in ("queue_full", "other")}
    assert told == {"queue_full": 1, "other": 1}


async def test_a_loop_that_is_held_up() -> None:
    """The lag is what the loop was late, and nothing is left running."""
    lag, before = Histogram((0.02, 1.0)), asyncio.all_tasks()
    async with LoopLag(lag, every_seconds=0.001):
        await eventually(lambda: sum(lag.counts) > 0)
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            pass  # as something does that blocks
        await eventually(lambda: sum(lag.counts[1:]) > 0)
    assert lag.sum > 0.02
    assert asyncio.all_tasks() == before
