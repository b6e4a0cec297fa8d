"""What a decision is made on: latency estimates, failing and overloaded replicas, and the spill gates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gateway.routing.breaker import Breaker
from gateway.routing.latency import LatencyEstimate
from gateway.routing.overload import Overload
from gateway.routing.silence import Silence
from gateway.routing.spill import RungKey, SpillGate


@dataclass(frozen=True, slots=True)
class ClusterState:
    """The state of all replicas; the mappings are live views that their owners keep true.

    `estimates` gives the estimates of a variant's ready replicas; `gates` are by alias and rung. `silent` are
    replicas that send nothing any more.
    """

    estimates: Callable[[str], Sequence[LatencyEstimate]]
    breakers: Mapping[str, Breaker] = field(default_factory=dict)
    overloads: Mapping[str, Overload] = field(default_factory=dict)
    gates: Mapping[RungKey, SpillGate] = field(default_factory=dict)
    silent: Mapping[str, Silence] = field(default_factory=dict)
