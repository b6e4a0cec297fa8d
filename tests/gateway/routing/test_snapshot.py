"""Snapshots of the state that decisions are made on: JSON, recorded decisions, hypothetical requests."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from math import inf
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import ConfigError
from config.schema import NO_FLOOR, Floor, LimitSettings, Spill, TimeoutSettings
from gateway.cli.route import explain_hypothetical
from gateway.errors import NotAllowed, RequestError, UnknownModel
from gateway.keys import Keys
from gateway.live_config import LiveConfig
from gateway.proxy.decision_log import DecisionLog, snapshot_now
from gateway.proxy.load.tracker import LoadTracker
from gateway.proxy.routing_features import session_from_name
from gateway.routing.cluster_state import ClusterState
from gateway.routing.explain import Explanation, explain, explain_recorded
from gateway.routing.latency import LatencyEstimate
from gateway.routing.pick import decide
from gateway.routing.request import RoutingRequest
from gateway.routing.sessions import Placement
from gateway.routing.snapshot import (
    CallerView,
    Snapshot,
    TargetView,
    floor_limits,
    nested_gates,
    read_snapshot,
    variant_views,
)
from gateway.routing.spill import SpillGate
from gateway.routing.target import Catalog, Target
from serving.registry import Registry
from serving.replica import Replica, State
from tests.gateway.routing.clusters import (
    BAD,
    EXCLUDED,
    HI,
    LO,
    MID,
    NOW,
    RUNGS,
    SPILL,
    TARGET,
    cluster,
    estimate,
    fleets,
    opened,
    request,
    requests,
    states,
)


def snapshot(
    *estimates: LatencyEstimate,
    target: Target = TARGET,
    gates: dict[tuple[str, str], SpillGate] | None = None,
    **fields: Any,
) -> Snapshot:
    """A snapshot of a cluster with these replicas."""
    by_variant: dict[str, tuple[LatencyEstimate, ...]] = {}
    for each in estimates:
        by_variant[each.variant] = (*by_variant.get(each.variant, ()), each)
    pinned = Target("lo", (LO,), NO_FLOOR, pinned=True)
    return Snapshot(
        recorded=datetime(2026, 1, 1, tzinfo=UTC),
        now_seconds=NOW,
        variants=variant_views((HI, MID, LO, BAD)),
        models={each.name: TargetView.of(each, 30.0) for each in (target, pinned)},
        estimates=by_variant,
        gates=nested_gates(gates or {}),
        **fields,
    )


@given(fleets, requests, states)
def test_a_snapshot_decides_as_the_gateway_did(
    fleet: list[LatencyEstimate], any_request: RoutingRequest, state: dict[str, Any]
) -> None:
    """A snapshot survives JSON, and a decision on it is the same as on the state that it was made of."""
    target = Target("smol", RUNGS, Floor(kl_mean=0.04), False, spill=SPILL, trust_declared=True, excluded=(EXCLUDED,))
    taken = snapshot(*fleet, target=target, **state)
    read = read_snapshot(taken.to_json(), "f")
    assert read == taken
    assert read.target("smol") == target
    now, later = (
        msgspec.structs.replace(any_request, target=each, rungs=each.filter((), None).permitted)
        for each in (target, read.target("smol"))
    )
    assert explain(later, read.cluster(), NOW) == explain(now, cluster(*fleet, **state), NOW)


@pytest.mark.parametrize(
    "text, words",
    [
        (b"", "f: not a valid routing snapshot: Input data was truncated"),
        (b"{}", "missing required field"),
        (b"\xff", "malformed"),
        (
            msgspec.json.encode({**msgspec.to_builtins(snapshot()), "format": 1}),
            r"Invalid enum value 1 - at `\$.format`",
        ),
        (
            msgspec.json.encode({**msgspec.to_builtins(snapshot()), "format": 4}),
            r"Invalid enum value 4 - at `\$.format`",
        ),
        (msgspec.json.encode({**msgspec.to_builtins(snapshot()), "variants": {}}), "'hi'"),
        (msgspec.json.encode({**msgspec.to_builtins(snapshot()), "breakers": {"a": {"x": []}, "b": 1}}), "Expected"),
    ],
)
def test_invalid_snapshots(text: bytes, words: str) -> None:
    """The error names the place of the snapshot, and the command that makes one."""
    with pytest.raises(ConfigError, match=words) as caught:
        read_snapshot(text, "f")
    assert str(caught.value).endswith("; `quantgate route state` makes one")


def test_a_snapshot_of_format_2() -> None:
    """It is read, too: its ladders are objects, of the weights by variant of each rung."""
    taken = msgspec.to_builtins(snapshot(estimate("hi-1")))
    for model in taken["models"].values():
        model["rungs"] = {name: {name: 1.0} for name in model["rungs"]}
    read = read_snapshot(msgspec.json.encode({**taken, "format": 2}), "f")
    assert read.target("smol") == TARGET
    assert read_snapshot(read.to_json(), "f") == read


@pytest.mark.parametrize("wait_seconds, chosen", [(inf, "hi-1"), (50.0, "hi-1"), (30.0, None)])
@given(blocks=st.lists(st.integers(0), max_size=3).map(tuple))
def test_a_recorded_decision(wait_seconds: float, chosen: str | None, blocks: tuple[int, ...]) -> None:
    """A record has what the decision was made on, without the prompt's hashes; a wait too long is not a choice."""
    state = cluster(estimate("hi-1", 40.0), estimate("mid-1", 41.0), breakers={"lo-1": opened()})
    recorded = request(
        rungs=(HI, MID),
        prompt_tokens=100,
        turn=7,
        request_id="r",
        blocks=blocks,
        floors=(NO_FLOOR, Floor(kl_mean=0.04)),
        precisions=frozenset({"bf16", "int8"}),
        cached_tokens={"hi-1": 50.0},
    )
    decisions = DecisionLog()
    decisions.append(recorded, state, decide(recorded, state, NOW), NOW, wait_seconds)
    record = decisions.find("r")
    assert record is not None
    read = read_snapshot(record.snapshot(103.0).to_json(), "f")
    assert read.request is not None
    again, wait_again = read.routing_request()
    assert (read.request.chosen, again.blocks, read.now_seconds, wait_again) == (chosen, (), NOW, wait_seconds)
    assert read.recorded <= datetime.now(UTC) - timedelta(seconds=3)
    explanation = explain_recorded(read)
    assert (explanation.chosen and explanation.chosen.replica) == chosen
    assert [each.variant for each in explanation.refused] == ["lo"]
    terms = explanation.candidates[0].terms
    assert terms is not None
    assert terms.cached == pytest.approx(0.05)


def test_a_snapshot_has_no_secrets() -> None:
    """The API key of a replica is in no snapshot, whether the replica is ready or not."""
    registry = Registry()
    ready = Replica("hi-1", "hi", "bf16", "http://hi-1", "m1", api_key="hunter2")
    registry.put(ready, State.READY)
    registry.put(replace(ready, id="hi-2"), State.FAILED)
    load = LoadTracker(registry.in_flight, {})
    load.keep_only(registry.ready)
    live_config = LiveConfig(Catalog({}, {"hi": HI}), Keys(), LimitSettings())
    taken = snapshot_now(live_config, ClusterState(load.estimates), {}, registry, NOW)
    assert [each.id for each in taken.estimates["hi"]] == ["hi-1"]
    assert [each.id for each in taken.absent] == ["hi-2"]
    assert b"hunter2" not in taken.to_json()


# Hypothetical requests


SNAPSHOT = snapshot(
    estimate("hi-1", context_tokens=1000.0),
    estimate("hi-2", 0.05),
    estimate("mid-1"),
    estimate("lo-1"),
    sessions={
        session_from_name(b"chat", None): Placement("hi", "hi-2"),
        session_from_name(b"chat", "alice"): Placement("mid", "mid-1"),
    },
    callers={"alice": CallerView(frozenset({"smol"}), floor_limits(Floor(kl_mean=0.02)), 2000)},
)


def hypothetical(
    model: str,
    headers: dict[bytes, bytes] | None = None,
    *,
    key: str | None = None,
    prompt_tokens: int = 0,
    max_tokens: int | None = None,
    snapshot: Snapshot = SNAPSHOT,
) -> Explanation:
    """Explain the decision on a request that was not sent."""
    return explain_hypothetical(snapshot, model, headers or {}, key, prompt_tokens, max_tokens)


@pytest.mark.parametrize(
    "model, fields, expected",
    [
        ("smol", {}, "hi-1"),
        ("lo", {}, "lo-1"),
        ("smol", {"headers": {b"x-quantgate-precision": b"int4"}}, "lo-1"),
        (
            "smol",
            {"headers": {b"x-quantgate-floor": b"kl_mean=0.02", b"x-quantgate-precision": b"int8,int4"}},
            "mid-1",
        ),
        ("smol", {"headers": {b"x-session-id": b"chat"}}, "hi-2"),
        ("smol", {"prompt_tokens": 5000}, "hi-2"),
        ("smol", {"max_tokens": 5000}, "hi-2"),
        # The answers of this key may have 2000 tokens, which do not fit in the context of hi-1.
        ("smol", {"key": "alice"}, "hi-2"),
        ("smol", {"key": "alice", "max_tokens": 10}, "hi-1"),
    ],
)
def test_hypothetical_requests(model: str, fields: dict[str, Any], expected: str) -> None:
    """The choice depends on headers, lengths and the key, as it would for a real request."""
    chosen = hypothetical(model, **fields).chosen
    assert chosen is not None
    assert chosen.replica == expected


def test_the_floor_of_a_key() -> None:
    """A variant below the key's floor is refused with the figure that misses it."""
    assert [(each.variant, each.why) for each in hypothetical("smol", key="alice").refused] == [
        ("lo", "kl_mean 0.05 misses the floor 0.02")
    ]


@pytest.mark.parametrize(
    "model, fields, kind",
    [
        ("gpt", {}, UnknownModel),
        ("lo", {"key": "alice"}, NotAllowed),
        ("smol", {"key": "bob"}, RequestError),
        ("smol", {"headers": {b"x-quantgate-floor": b"speed=1"}}, RequestError),
    ],
)
def test_refused_hypothetical_requests(model: str, fields: dict[str, Any], kind: type[RequestError]) -> None:
    """The error is the one that the request itself would get."""
    with pytest.raises(kind):
        hypothetical(model, **fields)


def test_the_wait_of_a_model() -> None:
    """A request may wait as long as its model allows, or else as the gateway does."""
    short = TimeoutSettings(queue_seconds=0.5)
    own = Target("smol", RUNGS, NO_FLOOR, False, timeouts=short, spill=Spill())
    assert TargetView.of(own, 30.0).wait_seconds == 0.5
    assert TargetView.of(TARGET, 30.0).wait_seconds == 30.0
    assert hypothetical("smol", snapshot=snapshot(estimate("hi-1", 1.6), target=own)).chosen is None
