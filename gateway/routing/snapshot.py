"""Everything that decisions are made on, written down, so that one can be explained by the functions that made it.

As JSON it holds no secret: neither keys of replicas nor of clients. Times are on the gateway's monotonic clock.
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from math import isfinite
from typing import Any, Literal, Self

import msgspec

from config.errors import ConfigError
from config.schema import NO_FLOOR, Floor, Spill
from config.variant import QualityMeasures, Variant
from gateway.errors import UnknownModel
from gateway.routing.breaker import Breaker
from gateway.routing.catalog import Target
from gateway.routing.cluster_state import ClusterState, GateName, Query
from gateway.routing.filters import Rejection
from gateway.routing.latency import LatencyEstimate
from gateway.routing.overload import Overload
from gateway.routing.sessions import Placement
from gateway.routing.spill import SpillGate

Limits = dict[str, float]


class RecordedVariant(msgspec.Struct, frozen=True):
    """What a decision knows of a variant."""

    precision: str
    quality: QualityMeasures


class RecordedTarget(msgspec.Struct, frozen=True):
    """What a model name stands for; its variants by name. Requests wait for up to `patience_seconds`."""

    rungs: tuple[str, ...]
    pinned: bool
    patience_seconds: float
    floor: Limits
    spill: Limits
    trust_declared: bool
    excluded: dict[str, str]  # by variant: why

    @classmethod
    def of(cls, target: Target, queue_seconds: float) -> Self:
        """Write a target down; `queue_seconds` is how long requests wait where it doesn't say."""
        own_seconds = target.timeouts.queue_seconds
        return cls(
            tuple([rung.name for rung in target.rungs]),
            target.pinned,
            queue_seconds if own_seconds is None else own_seconds,
            limits_of(target.floor),
            target.spill.model_dump(),
            target.trust_declared,
            {refusal.variant.name: refusal.why for refusal in target.excluded},
        )


class RecordedCaller(msgspec.Struct, frozen=True):
    """What a decision knows of a key's holder: which models it may use, None for all, and what it is limited to."""

    models: frozenset[str] | None = None
    floor: Limits = {}
    max_tokens: int | None = None


class Absent(msgspec.Struct, frozen=True):
    """A replica that isn't ready."""

    id: str
    variant: str
    state: str
    reason: str


class Asked(msgspec.Struct, frozen=True):
    """One request that a decision was made for, as it was made, and who was chosen: None if nobody was.

    `patience_seconds` is how long it could wait; None: for ever, for it had already waited in line.
    """

    id: str
    model: str
    query: Query
    floors: tuple[Limits, ...]
    precisions: frozenset[str] | None
    chosen: str | None
    patience_seconds: float | None


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What decisions were made on at one moment; with `asked`, as much of it as one of them was made on."""

    format: Literal[1] = 1
    recorded: datetime
    now_seconds: float
    variants: dict[str, RecordedVariant]
    models: dict[str, RecordedTarget]
    outlooks: dict[str, tuple[LatencyEstimate, ...]]
    absent: tuple[Absent, ...] = ()
    breakers: dict[str, dict[str, Any]] = {}
    marks: dict[str, dict[str, Any]] = {}
    gates: dict[str, dict[str, SpillGate]] = {}  # by alias and variant
    sessions: dict[str, Placement] = {}
    callers: dict[str, RecordedCaller] = {}
    asked: Asked | None = None

    def target(self, name: str) -> Target:
        """What a model name stood for; UnknownModel if it was no name."""
        told = self.models.get(name)
        if told is None:
            raise UnknownModel(f"no model {name!r}; there are: {', '.join(self.models) or 'none'}", param="model")
        return Target(
            name,
            tuple([self._variant(rung) for rung in told.rungs]),
            floor_of(told.floor),
            told.pinned,
            spill=Spill.model_validate(told.spill),
            trust_declared=told.trust_declared,
            excluded=tuple([Rejection(self._variant(rung), why) for rung, why in told.excluded.items()]),
        )

    def scene(self) -> ClusterState:
        """The scene, for deciding once more."""
        return ClusterState(
            lambda variant: self.outlooks.get(variant, ()),
            {each: msgspec.convert(held, Breaker) for each, held in self.breakers.items()},
            {each: msgspec.convert(held, Overload) for each, held in self.marks.items()},
            {(alias, rung): gate for alias, gates in self.gates.items() for rung, gate in gates.items()},
        )

    def to_json(self) -> bytes:
        """Write it down."""
        return msgspec.json.encode(self)

    def _variant(self, name: str) -> Variant:
        told = self.variants[name]
        return Variant(name, told.precision, told.quality)


_STATE = msgspec.json.Decoder(State)


def read_state(text: bytes, where: str) -> State:
    """Read a recorded state; ConfigError, which names `where` it was, if it is none."""
    try:
        state = _STATE.decode(text)
        # What it names must be in it.
        for name in state.models:
            state.target(name)
        state.scene()
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, KeyError) as error:
        raise ConfigError(f"{where}: is no recorded state: {error}; `quantgate route state` makes one") from error
    return state


def floor_of(limits: Limits) -> Floor:
    """Read a floor."""
    return Floor.model_validate(limits) if limits else NO_FLOOR


def limits_of(floor: Floor) -> Limits:
    """Write a floor down."""
    return floor.model_dump(exclude_none=True)


def bare(outlook: LatencyEstimate) -> LatencyEstimate:
    """Leave out how a replica is talked to."""
    replica = replace(outlook.replica, api_key=None, tls=None)
    return msgspec.structs.replace(outlook, replica=replica)


def nested(gates: Mapping[GateName, SpillGate]) -> dict[str, dict[str, SpillGate]]:
    """Write gates down, for JSON has no pairs as names."""
    told: dict[str, dict[str, SpillGate]] = {}
    for (alias, rung), gate in gates.items():
        told.setdefault(alias, {})[rung] = gate
    return told


def held(against: Mapping[str, Breaker] | Mapping[str, Overload]) -> dict[str, dict[str, Any]]:
    """Write down what is held against replicas; times that are infinite, which JSON can't say, are so by default."""
    told = {replica_id: msgspec.to_builtins(each) for replica_id, each in against.items()}
    return {
        replica_id: {name: value for name, value in each.items() if not isinstance(value, float) or isfinite(value)}
        for replica_id, each in told.items()
    }
