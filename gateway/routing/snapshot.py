"""The state that a decision is made on, as a value that can be written to JSON and decided on again later.

It holds no secret: neither keys of replicas nor of clients. Times are on the gateway's monotonic clock.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from math import inf
from typing import Literal, Self

import msgspec

from config.errors import ConfigError
from config.schema import NO_FLOOR, Floor, Spill
from config.variant import QualityMeasures, Variant
from gateway.errors import UnknownModel
from gateway.routing.breaker import Breaker
from gateway.routing.cluster_state import ClusterState
from gateway.routing.filters import Rejection
from gateway.routing.latency import LatencyEstimate
from gateway.routing.overload import Overload
from gateway.routing.request import RoutingRequest
from gateway.routing.sessions import Placement
from gateway.routing.silence import Silence
from gateway.routing.spill import RungKey, SpillGate
from gateway.routing.target import Target

Limits = dict[str, float]
Gates = dict[str, dict[str, SpillGate]]  # by alias and rung


class VariantView(msgspec.Struct, frozen=True):
    """What a decision knows of a variant."""

    precision: str
    quality: QualityMeasures


class TargetView(msgspec.Struct, frozen=True):
    """What a model name stands for; `rungs` names its variants, best first, and in format 2 is an object by variant.

    `canary` is the new variant, if this is the ladder of a rollout's canary arm.
    """

    rungs: tuple[str, ...] | dict[str, dict[str, float]]
    pinned: bool
    wait_seconds: float  # how long its requests may wait for a replica
    floor: Limits
    spill: Limits
    trust_declared: bool
    excluded: dict[str, str]  # why, by variant
    canary: str | None = None

    @classmethod
    def of(cls, target: Target, queue_seconds: float) -> Self:
        """Describe a target; `queue_seconds` is the wait that holds where the target sets none."""
        wait_seconds = target.timeouts.queue_seconds
        return cls(
            tuple([rung.name for rung in target.rungs]),
            target.pinned,
            queue_seconds if wait_seconds is None else wait_seconds,
            floor_limits(target.floor),
            target.spill.model_dump(),
            target.trust_declared,
            {rejection.variant.name: rejection.why for rejection in target.excluded},
            target.canary,
        )


class CallerView(msgspec.Struct, frozen=True):
    """What a decision knows of an API key: the models that it may use (None: all), and its limits."""

    models: frozenset[str] | None = None
    floor: Limits = {}
    max_tokens: int | None = None


class AbsentReplica(msgspec.Struct, frozen=True):
    """A replica that is not ready."""

    id: str
    variant: str
    state: str
    reason: str


class RequestView(msgspec.Struct, frozen=True):
    """One request that was decided on, and the replica that was chosen; None if none was.

    `wait_seconds` is how long it could wait; None if it had waited in the queue already.
    """

    id: str
    model: str
    turn: int
    prompt_tokens: float
    answer_tokens: int | None
    session: str | None
    floors: tuple[Limits, ...]
    precisions: frozenset[str] | None
    placement: Placement | None
    cached_tokens: dict[str, float]
    tried: frozenset[str]
    chosen: str | None
    wait_seconds: float | None
    tools: bool = False
    session_hash: int | None = None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The state of everything that decisions depend on; with `request`, that of one decision."""

    format: Literal[2, 3] = 3
    recorded: datetime
    now_seconds: float
    variants: dict[str, VariantView]
    models: dict[str, TargetView]
    estimates: dict[str, tuple[LatencyEstimate, ...]]
    absent: tuple[AbsentReplica, ...] = ()
    breakers: dict[str, Breaker] = {}
    overloads: dict[str, Overload] = {}
    gates: Gates = {}
    silent: dict[str, Silence] = {}
    sessions: dict[str, Placement] = {}
    callers: dict[str, CallerView] = {}
    request: RequestView | None = None

    def target(self, name: str) -> Target:
        """What a model name stood for; UnknownModel if it was none."""
        view = self.models.get(name)
        if view is None:
            raise UnknownModel(f"no model {name!r}; there are: {', '.join(self.models) or 'none'}", param="model")
        return Target(
            name,
            tuple(map(self._variant, view.rungs)),
            floor_from(view.floor),
            view.pinned,
            spill=Spill.model_validate(view.spill),
            trust_declared=view.trust_declared,
            excluded=tuple([Rejection(self._variant(variant), why) for variant, why in view.excluded.items()]),
            canary=view.canary,
        )

    def cluster(self) -> ClusterState:
        """The state of the replicas, to decide on."""
        gates = {(alias, rung): gate for alias, rungs in self.gates.items() for rung, gate in rungs.items()}
        return ClusterState(
            lambda variant: self.estimates.get(variant, ()), self.breakers, self.overloads, gates, silent=self.silent
        )

    def routing_request(self) -> tuple[RoutingRequest, float]:
        """The request that was decided on, and how long it could wait; its permitted rungs are worked out anew."""
        view = self.request
        assert view is not None, "a snapshot of no request"
        target, floors = self.target(view.model), tuple([floor_from(limits) for limits in view.floors])
        request = RoutingRequest(
            target,
            target.filter(floors, view.precisions).permitted,
            view.turn,
            view.id,
            prompt_tokens=view.prompt_tokens,
            answer_tokens=view.answer_tokens,
            session=view.session,
            floors=floors,
            precisions=view.precisions,
            placement=view.placement,
            session_hash=view.session_hash,
            cached_tokens=view.cached_tokens,
            tried=view.tried,
            tools=view.tools,
        )
        return request, inf if view.wait_seconds is None else view.wait_seconds

    def to_json(self) -> bytes:
        """Encode it."""
        finite = {"breakers": _finite(self.breakers), "overloads": _finite(self.overloads)}
        return msgspec.json.encode({**msgspec.structs.asdict(self), **finite})

    def _variant(self, name: str) -> Variant:
        view = self.variants[name]
        return Variant(name, view.precision, view.quality)


_SNAPSHOT = msgspec.json.Decoder(Snapshot)


def read_snapshot(text: bytes, where: str) -> Snapshot:
    """Decode a snapshot and check that it is complete; ConfigError names `where` it is from."""
    try:
        snapshot = _SNAPSHOT.decode(text)
        for name in snapshot.models:
            snapshot.target(name)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{where}: not a valid routing snapshot: {error}; `quantgate route state` makes one"
        ) from error
    return snapshot


def variant_views(variants: Iterable[Variant]) -> dict[str, VariantView]:
    """Describe variants by name."""
    return {variant.name: VariantView(variant.precision, variant.quality) for variant in variants}


def nested_gates(gates: Mapping[RungKey, SpillGate]) -> Gates:
    """Order gates by alias, then rung: JSON has no pairs as keys."""
    nested: Gates = {}
    for (alias, rung), gate in gates.items():
        nested.setdefault(alias, {})[rung] = gate
    return nested


def floor_from(limits: Limits) -> Floor:
    """Build a floor from its limits."""
    return Floor.model_validate(limits) if limits else NO_FLOOR


def floor_limits(floor: Floor) -> Limits:
    """The limits of a floor that are set."""
    return floor.model_dump(exclude_none=True)


def _finite(states: Mapping[str, Breaker | Overload]) -> dict[str, dict[str, object]]:
    """The fields that are set; JSON has no infinity, and infinite times are always the defaults."""
    return {
        replica_id: {name: value for name, value in msgspec.structs.asdict(state).items() if value not in (inf, -inf)}
        for replica_id, state in states.items()
    }
