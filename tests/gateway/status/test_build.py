"""The pure function that builds a status: a table of states of a ladder."""

from dataclasses import replace
from typing import Any

import pytest

from config.schema import AliasSettings
from config.variant import Variant
from gateway.routing.engine_metrics import EngineMetrics, PollResult
from gateway.routing.latency import LatencyEstimate
from gateway.routing.speed import SpeedProfile
from gateway.routing.spill import SpillGate
from gateway.routing.target import Catalog
from gateway.status.build import StatusFacts, status_of
from gateway.status.traffic import Totals, TrafficSample
from gateway.status.values import AliasStatus, GatewayStatus, WorkerStatus, read_status
from serving.replica import Replica, ReplicaStatus, State
from tests.gateway.routing.clusters import BAD, HI, LO, MID, NOW, cluster, estimate

GATEWAY = GatewayStatus("1.0", 0.0, 5.0, False, WorkerStatus(1, 1, 7), 0, False, None)
LADDER = AliasSettings.model_validate({"ladder": ["hi", "mid", "lo"], "floor": {"top1_agreement": 0.95}})
SPILLING = {("smol", "hi"): SpillGate(spilling=True, since_seconds=NOW - 30)}


def facts(*estimates: LatencyEstimate, **changes: Any) -> StatusFacts:
    """Facts of one alias over three variants."""
    variants = {variant.name: variant for variant in (HI, MID, LO, BAD)}
    state = {name: changes.pop(name) for name in ("gates", "silent") if name in changes}
    made = StatusFacts(
        gateway=GATEWAY,
        now=NOW,
        catalog=Catalog({"smol": LADDER}, variants),
        cluster=cluster(*estimates, **state),
        replicas=[_ready(each) for each in estimates],
        polls={},
        breakers={},
        waiting={},
        speeds={},
        canaries={},
        history=(),
        recent=(),
        rollouts=(),
        errors=(),
    )
    return replace(made, **changes)


def _ready(each: LatencyEstimate) -> ReplicaStatus:
    return ReplicaStatus(Replica(each.id, each.variant, "x", "http://x", "m"), State.READY, "", NOW - 60, 3)


def alias(*estimates: LatencyEstimate, **changes: Any) -> AliasStatus:
    """The status of the alias; it survives JSON."""
    status = status_of(facts(*estimates, **changes))
    assert read_status(status.to_json()) == status
    return status.aliases[0]


@pytest.mark.parametrize(
    "estimates, changes, answers, states",
    [
        ((), {}, None, ["no_replica", "no_replica", "rejected"]),
        ((estimate("hi-1"),), {}, "hi-1 preferred", ["answers", "no_replica", "rejected"]),
        ((estimate("hi-1"), estimate("mid-1")), {}, "hi-1 preferred", ["answers", "ready", "rejected"]),
        ((estimate("mid-1"),), {}, "mid-1 fallback", ["no_replica", "answers", "rejected"]),
        ((estimate("lo-1"),), {}, None, ["no_replica", "no_replica", "rejected"]),
        (
            (estimate("hi-1", 2.2), estimate("mid-1")),
            {"gates": SPILLING},
            "mid-1 spill",
            ["spilling", "answers", "rejected"],
        ),
        ((estimate("hi-1", has_room=False),), {}, None, ["ready", "no_replica", "rejected"]),
    ],
)
def test_states_of_a_ladder(
    estimates: tuple[LatencyEstimate, ...], changes: dict[str, Any], answers: str | None, states: list[str]
) -> None:
    """Who would answer now and why, and what each rung does."""
    status = alias(*estimates, **changes)
    now = status.answers_now
    assert (f"{now.replica} {now.reason}" if now else None) == answers
    assert [rung.state for rung in status.rungs] == states


def test_a_gate_that_spills() -> None:
    """Since when, and the share of new conversations that goes down."""
    hi, mid, _ = alias(estimate("hi-1", 0.75), estimate("mid-1"), gates=SPILLING).rungs
    assert (hi.gate.state, hi.gate.seconds, hi.gate.share_down) == ("spilling", 30.0, 0.5)
    assert (mid.gate.state, mid.gate.seconds, mid.gate.share_down) == ("closed", None, 0.0)
    assert (hi.wait_seconds, mid.wait_seconds) == (0.75, 0.0)


def test_shares_of_traffic() -> None:
    """Of the answers of the last minutes; failures are apart, and the canary has its own share."""
    before = {("smol", "hi", "bf16"): Totals(100, 1)}
    after = {
        ("smol", "hi", "bf16"): Totals(161, 2),
        ("smol", "mid", "int8"): Totals(30),
        ("smol", "bad", "int4"): Totals(10),
        ("other", "hi", "bf16"): Totals(1000),
    }
    recent = (TrafficSample(0.0, 0.0, before), TrafficSample(60.0, 60.0, after))
    status = alias(estimate("hi-1"), recent=recent, canaries={"smol": ("bad", 0.25)}, waiting={"smol": 4})
    assert [(rung.requests, rung.share) for rung in status.rungs] == [(60, 0.6), (30, 0.3), (0, 0.0)]
    assert status.canary is not None
    assert (status.canary.variant, status.canary.weight, status.canary.share) == ("bad", 0.25, 0.1)
    assert (status.requests, status.failed, status.waiting) == (101, 1, 4)


def test_a_replica() -> None:
    """What the last poll said, and what this gateway knows."""
    poll = PollResult(EngineMetrics(NOW, running=2.0, waiting=1.0, kv_usage=0.5))
    status = status_of(facts(estimate("hi-1", None, stale=True), polls={"hi-1": poll}, breakers={"hi-1": "open"}))
    (replica,) = status.replicas
    assert (replica.running, replica.waiting, replica.kv_usage, replica.in_flight) == (2.0, 1.0, 0.5, 3)
    assert (replica.wait_seconds, replica.load_known, replica.breaker, replica.state_seconds) == (
        None,
        False,
        "open",
        60.0,
    )


def test_a_measured_speed() -> None:
    """One answer alone, all of them together, and prompts, in tokens per second."""
    speed = SpeedProfile((0.02, 0.025), (50.0, 80.0), 0.001, 2)
    variants = {variant.name: variant for variant in status_of(facts(speeds={"mid": speed})).variants}
    assert variants["hi"].speed is None
    measured = variants["mid"].speed
    assert measured is not None
    assert (measured.answer_tokens_per_second, measured.total_tokens_per_second) == (50.0, 80.0)
    assert (measured.prompt_tokens_per_second, measured.slots) == (1000.0, 2)


def test_bounds_are_shown() -> None:
    """Each measure has the end of its interval that floors are held against; an unknown measure is left out."""
    quality = replace(MID.quality, bounds={"top1_agreement": 0.96})
    catalog = Catalog({}, {"mid": Variant("mid", "int8", quality)})
    (variant,) = status_of(facts(catalog=catalog)).variants
    assert {each.name: (each.value, each.bound) for each in variant.measures} == {
        "top1_agreement": (0.97, 0.96),
        "kl_mean": (0.01, 0.01),
        "perplexity_ratio": (1.01, 1.01),
    }
