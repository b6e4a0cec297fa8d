"""What decisions are made on, as a recorded state: now, or when one of them was made."""

import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from math import isfinite

import msgspec

from config.schema import NO_FLOOR
from config.variant import Variant
from gateway.keys import Keys
from gateway.live_config import LiveConfig
from gateway.proxy.decision_log import DecisionRecord
from gateway.proxy.dispatcher import Dispatcher
from gateway.routing.latency import LatencyEstimate
from gateway.routing.snapshot import (
    Absent,
    Asked,
    RecordedCaller,
    RecordedTarget,
    RecordedVariant,
    State,
    bare,
    held,
    limits_of,
    nested,
)
from serving.registry import Registry
from serving.replica import State as Life


def state_now(live_config: LiveConfig, dispatch: Dispatcher, registry: Registry) -> State:
    """Everything that a request would be decided on now."""
    catalog, scene = live_config.catalog, dispatch.scene
    queue_seconds = live_config.limits.queue_seconds
    return State(
        recorded=datetime.now(UTC),
        now_seconds=dispatch.now(),
        variants=_variants(catalog.variants.values()),
        models={name: RecordedTarget.of(catalog.resolve(name), queue_seconds) for name in catalog.names()},
        outlooks=_bared({name: scene.outlooks(name) for name in catalog.variants}),
        absent=_absent(registry),
        breakers=held(scene.breakers),
        marks=held(scene.marks),
        gates=nested(scene.gates),
        sessions=dict(dispatch.memory.stays()),
        callers=_callers(live_config.keys),
    )


def state_then(made: DecisionRecord, now: float) -> State:
    """What one decision was made on; `now` is on its clock."""
    want, offer, patience_seconds = made.want, made.decision.offer, made.patience_seconds
    query = msgspec.structs.replace(made.query, ask=msgspec.structs.replace(made.query.ask, blocks=()))
    target = want.target
    return State(
        recorded=datetime.fromtimestamp(time.time() - (now - made.at_seconds), UTC),
        now_seconds=made.at_seconds,
        variants=_variants([*target.rungs, *(refusal.variant for refusal in target.excluded)]),
        models={target.name: RecordedTarget.of(target, 0.0)},
        outlooks=_bared(made.outlooks),
        breakers=held(made.breakers),
        marks=held(made.marks),
        gates=nested(made.gates),
        asked=Asked(
            want.request_id,
            target.name,
            query,
            tuple([limits_of(floor) for floor in want.floors if floor is not NO_FLOOR]),
            want.precisions,
            None if offer is None or offer.comes_too_late(patience_seconds) else offer.choice.replica.id,
            patience_seconds if isfinite(patience_seconds) else None,
        ),
    )


def _variants(variants: Iterable[Variant]) -> dict[str, RecordedVariant]:
    return {each.name: RecordedVariant(each.precision, each.quality) for each in variants}


def _bared(outlooks: Mapping[str, Iterable[LatencyEstimate]]) -> dict[str, tuple[LatencyEstimate, ...]]:
    return {name: tuple(map(bare, several)) for name, several in outlooks.items()}


def _absent(registry: Registry) -> tuple[Absent, ...]:
    return tuple(
        [
            Absent(each.replica.id, each.replica.variant, each.state.value, each.reason)
            for each in registry.snapshot()
            if each.state is not Life.READY
        ]
    )


def _callers(keys: Keys) -> dict[str, RecordedCaller]:
    callers = [issued.caller for issued in (keys.issued or {}).values()]
    return {
        each.name: RecordedCaller(each.aliases, limits_of(each.floor), each.max_tokens) for each in callers if each.name
    }
