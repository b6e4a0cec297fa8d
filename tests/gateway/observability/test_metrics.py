"""The metrics on /metrics: names, labels, values, exemplars and the number of series."""

import asyncio
import time
from itertools import product

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from config.variant import MEASURES, PARENT_QUALITY, QualityMeasures, Variant
from gateway.observability.metrics import UNKNOWN, FleetCollector, Histogram, LoopLag, Metrics
from gateway.observability.metrics.exposition import exposition
from gateway.observability.metrics.fleet import BREAKER_STATES, SILENCE_STATES
from gateway.observability.metrics.table import FIRST_TOKEN_BUCKETS, TABLE
from gateway.openai.usage import Usage
from gateway.proxy.stats import RequestStats
from gateway.routing.latency import LatencyEstimate
from gateway.routing.pick import Candidate, Reason
from serving.registry import Registry
from serving.replica import Replica, State
from tests.fakes.running import FakeReplica, eventually
from tests.gateway.fleet import CONFIG, HELLO, STREAM, Fleet

pytestmark = pytest.mark.asyncio(loop_scope="session")

# Values of the label `reason` of quantgate_rejections_total.
REJECTION_REASONS = (
    *("rate_limit", "queue_full", "queue_timeout", "draining", "too_large", "too_slow", "not_allowed"),
    "keys_unavailable",
    *("invalid_key", "invalid_request", "unknown_model", "floor", "no_replica", "other"),
)
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


async def test_the_table_is_what_metrics_exposes(fleet: Fleet) -> None:
    """Names, types and help of /metrics are those of the table, each metric once."""
    response = await fleet.admin.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = [
        (family.name, family.type, family.documentation)
        for family in text_string_to_metric_families(response.text)
        if not family.name.startswith("process_")
    ]
    assert sorted(families) == sorted((spec.name.removesuffix("_total"), spec.type, spec.help) for spec in TABLE)


async def test_labels_are_those_of_the_table(fleet: Fleet, fake: FakeReplica) -> None:
    """Each family has the table's labels, with or without samples; a histogram's samples add `le`."""
    with fleet.replicas(("hi", fake.url)):
        await fleet.ask(STREAM)
        families = [each for each in fleet.served.metrics.registry.collect() if not each.name.startswith("process_")]
    specs = {spec.name.removesuffix("_total"): spec for spec in TABLE}
    # `_labelnames` is where prometheus_client keeps the label names of a family without samples.
    labels = {family.name: getattr(family, "_labelnames") for family in families}  # noqa: B009 - mypy knows no such name
    assert labels == {name: spec.labels for name, spec in specs.items()}
    for family in families:
        assert all(set(sample.labels) - {"le"} == set(specs[family.name].labels) for sample in family.samples)


async def test_the_form_of_the_table() -> None:
    """Names follow Prometheus' conventions, help texts are sentences, and only histograms have buckets, ascending."""
    for spec in TABLE:
        assert spec.name.startswith("quantgate_")
        assert spec.name.endswith("_total") == (spec.type == "counter")
        assert spec.help.endswith(".")
        assert bool(spec.buckets) == (spec.type == "histogram")
        # Each worker is scraped by itself: the help says how gauges are aggregated.
        assert spec.help.endswith(("Sum it over workers.", "Take the maximum over workers.")) == (spec.type == "gauge")
        assert list(spec.buckets) == sorted(set(spec.buckets))


async def test_labels_come_from_the_configuration(fleet: Fleet, fake: FakeReplica) -> None:
    """No value that a client sends becomes a label value."""
    client_value = "made-up-by-a-client"
    with fleet.replicas(("hi", fake.url)):
        await fleet.ask()
        await fleet.ask(STREAM)
        await fleet.ask({**HELLO, "model": client_value})
        await fleet.ask({**HELLO, "model": f"smol/{client_value}", "user": client_value})
        await fleet.ask({**HELLO, "provider": {"quantizations": [client_value]}}, {"x-request-id": client_value})
        await fleet.ask({**HELLO, "max_tokens": client_value})
        await fleet.client.post(f"/v1/{client_value}")
        samples = await fleet.metrics()
    assert client_value not in str(samples)
    seen: dict[str, set[str]] = {}
    for _, labels in samples:
        for name, value in labels:
            seen.setdefault(name, set()).add(value)
    assert seen["alias"] <= {*CONFIG["aliases"], *CONFIG["variants"], UNKNOWN}
    assert seen["variant"] <= {*CONFIG["variants"], "none"}
    assert seen["precision"] <= {"bf16", "int8", "int4", "fp8", "none"}
    assert seen["endpoint"] <= {"chat.completions", "completions"}
    choice_reasons = {"preferred", "spill", "floor", "pinned", "fallback", "none"}
    assert seen["reason"] <= {*choice_reasons, *REJECTION_REASONS, "poison", "attempts", "budget", "slow_reader"}
    assert seen["kind"] == {"prompt", "completion", "reasoning"}


async def test_counts_after_known_traffic(fleet: Fleet, fake: FakeReplica) -> None:
    """Requests, tokens and latencies of three complete responses and two streams of four tokens are counted."""
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
    increases = [after - earlier for after, earlier in zip(await counts(), before, strict=True)]
    assert increases == [5, 20, 5, 2, 6, 5, 5]


async def test_buckets_are_those_of_vllm(fleet: Fleet, fake: FakeReplica) -> None:
    """Time to first token has the buckets of vLLM's own metric."""
    with fleet.replicas(("hi", fake.url)):
        await fleet.ask(STREAM)
    bounds = {
        float(dict(labels)["le"])
        for name, labels in await fleet.metrics()
        if name == "quantgate_time_to_first_token_seconds_bucket"
    }
    assert bounds == {*FIRST_TOKEN_BUCKETS, float("inf")}


async def test_fleet_collector() -> None:
    """State, load and quality are read at each scrape: one state per replica is 1; unknown values have no sample."""
    registry, metrics, silences = Registry(), Metrics(), dict[str, str]()
    variants = (
        Variant("hi", "bf16", PARENT_QUALITY),
        Variant("odd", "fp8", QualityMeasures("declared", kl_mean=0.02)),
    )
    metrics.registry.register(
        FleetCollector(registry, lambda: variants, lambda: {"hi-1": "half_open"}, silences=lambda: silences)
    )
    registry.put(Replica("hi-1", "hi", "bf16", "http://x", "m1"), State.WARMING)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"quantgate_{name}", labels)

    labels = {"replica": "hi-1", "variant": "hi", "precision": "bf16"}
    assert {state: value("replica_state", **labels, state=state) for state in State if state is not State.WARMING} == {
        state: 0.0 for state in State if state is not State.WARMING
    }
    assert value("replica_state", **labels, state="warming") == 1
    registry.take("hi-1")
    assert value("replica_in_flight", **labels) == 1
    registry.give_back("hi-1")
    assert value("replica_in_flight", **labels) == 0
    age = value("replica_state_seconds", **labels)
    assert age is not None
    assert age >= 0
    breaker = {state: value("replica_breaker", replica="hi-1", variant="hi", state=state) for state in BREAKER_STATES}
    assert breaker == {"closed": 0, "half_open": 1, "open": 0}
    for current in ("responsive", "silent", "hung"):
        silences["hi-1"] = current
        silence = {
            state: value("replica_silence", replica="hi-1", variant="hi", state=state) for state in SILENCE_STATES
        }
        assert silence == {"responsive": 0, "silent": 0, "hung": 0, current: 1}
    quality = {"variant": "odd", "precision": "fp8", "source": "declared"}
    assert value("variant_quality", **quality, measure="kl_mean") == 0.02
    assert value("variant_quality", **quality, measure="top1_agreement") is None
    assert value("variant_quality_bound", **quality, measure="kl_mean") == 0.02  # what is declared has no interval
    perfect = {"variant": "hi", "precision": "bf16", "source": "parent"}
    assert [value("variant_quality", **perfect, measure=measure) for measure in MEASURES] == [1, 0, 1, 0, 1]
    registry.remove("hi-1")
    assert value("replica_state", **labels, state="warming") is None


async def test_exemplars(fleet: Fleet, fake: FakeReplica) -> None:
    """OpenMetrics, requested with Prometheus' accept header, names the latest request of a bucket."""
    with fleet.replicas(("lo", fake.url)):
        await fleet.ask({**STREAM, "model": "lo"}, {"x-request-id": "slow-one"})
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
    response = await fleet.admin.get("/metrics", headers={"accept": accept})
    assert response.headers["content-type"].startswith(OPENMETRICS)
    with_exemplar = [
        sample.name
        for family in openmetrics_families(response.text)  # type: ignore[no-untyped-call]
        for sample in family.samples
        if sample.labels.get("alias") == "lo"
        and sample.exemplar
        and sample.exemplar.labels == {"request_id": "slow-one"}
    ]
    # Each value of this request is the latest of its bucket, so it is the bucket's exemplar.
    names = ("time_to_first_token", "request", "queue")
    assert sorted(with_exemplar) == sorted(f"quantgate_{name}_seconds_bucket" for name in names)
    assert "_created" not in response.text


async def test_series_budget() -> None:
    """10 aliases with 5 variants of 20 replicas each have fewer than 20,000 series, whatever the traffic."""
    metrics, registry = Metrics(), Registry()
    variants = [Variant(f"v{number}", "int8", QualityMeasures("measured", 0.1, 0.9, 1.1)) for number in range(5)]
    metrics.registry.register(FleetCollector(registry, lambda: variants))
    for variant, number in product(variants, range(20)):
        registry.put(Replica(f"{variant.name}-{number}", variant.name, "int8", "http://x", "m"), State.READY)
    for alias in (*(f"a{number}" for number in range(10)), *(variant.name for variant in variants), UNKNOWN):
        record_every_outcome(metrics, alias, variants)
    for reason in ("slow_reader", "idle", "drain", "too_large"):
        metrics.clients_cut.labels(reason).inc()
    for outcome in ("applied", "refused", "failed"):
        metrics.reloads.labels(outcome).inc()
    page = await exposition(metrics.registry, "")
    lines = [line for line in page.body.decode().splitlines() if not line.startswith("#")]
    assert 10_000 < len(lines) < 20_000
    assert not any('"_other"' in line for line in lines)


CODES_OF_REPLICAS = ("200", "400", "413", "422", "499", "502", "503", "504", "upstream_error", "upstream_disconnected")
CODES_OF_GATEWAY = ("400", "401", "403", "404", "408", "413", "429", "431", "499", "500", "502", "503", "504")


def record_every_outcome(metrics: Metrics, alias: str, variants: list[Variant]) -> None:
    """Record every possible outcome of a request for an alias, or for a variant by its name."""
    pinned = any(variant.name == alias for variant in variants)
    serving = [] if alias == UNKNOWN else [each for each in variants if not pinned or each.name == alias]
    outcomes: list[tuple[Variant, Reason]] = []
    for rung, variant in enumerate(serving):
        outcomes += [(variant, reason) for reason in reasons(rung, pinned=pinned)]
    for endpoint in ("chat.completions", "completions"):
        for code in CODES_OF_GATEWAY:
            record_request(metrics, alias, endpoint, code, None)
        for (variant, reason), code in product(outcomes, CODES_OF_REPLICAS):
            choice = Candidate(LatencyEstimate("r", variant.name, True, True, True, False, 0, 0.0), variant, reason)
            record_request(metrics, alias, endpoint, code, choice)
    for rejection in REJECTION_REASONS:
        metrics.rejected(alias, rejection)
    for code in ("overloaded", "upstream_error", "upstream_unreachable", "upstream_disconnected", "upstream_timeout"):
        metrics.retries.labels(alias, code).inc()
    for variant in serving[1:]:
        metrics.spills.labels(alias, variant.name).inc()
    metrics.floor_rejections.labels(alias).inc()


def reasons(rung: int, *, pinned: bool) -> tuple[Reason, ...]:
    """Reasons for which a rung may be chosen."""
    if pinned:
        return ("pinned",)
    return ("floor", "fallback", "spill", "canary") if rung else ("preferred", "canary")


def record_request(metrics: Metrics, alias: str, endpoint: str, code: str, choice: Candidate | None) -> None:
    """Record one request from start to end."""
    with RequestStats(metrics, lambda *_: None, endpoint, "r") as stats:
        stats.alias, stats.code = alias, code
        if choice is not None:
            stats.attempt(choice)
            stats.sent()
            stats.token()
            stats.token()
            stats.usage = Usage(1, 2)


async def test_event_loop_lag() -> None:
    """Blocking the event loop shows as lag, and no task outlives the block."""
    lag, before = Histogram((0.02, 1.0)), asyncio.all_tasks()
    async with LoopLag(lag, interval_seconds=0.001):
        await eventually(lambda: sum(lag.counts) > 0)
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            pass  # block the event loop
        await eventually(lambda: sum(lag.counts[1:]) > 0)
    assert lag.sum > 0.02
    assert asyncio.all_tasks() == before
