"""The gateway's own policy: its dispatcher with all of its state, on the simulation's clock.

The simulation replaces the network (requests, polls, health checks) and the parsing of requests. Engines are polled as
often as gateway.proxy.load.polling does; a retry is not taken from the budget.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

from config.capacity import Measurement
from config.external import ExternalModel
from config.schema import AliasSettings, Floor, Spill
from config.variant import EXTERNAL, QualityMeasures, Variant
from gateway.errors import Overloaded, Unavailable, UpstreamDisconnected
from gateway.observability.metrics import Metrics
from gateway.proxy.dispatcher import Dispatcher
from gateway.proxy.leases import Lease
from gateway.proxy.load.polling import DEFAULT_INTERVALS, PollIntervals
from gateway.proxy.load.tracker import LoadTracker
from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.pick import decide
from gateway.routing.prefix_index import BLOCK_BYTES, MAX_BLOCKS
from gateway.routing.request import RoutingRequest
from gateway.routing.sessions import Placement
from gateway.routing.speed import SpeedProfile
from gateway.routing.spill import PAUSE_SECONDS
from gateway.routing.target import DEFAULT_SPILL, Catalog, Target
from serving.registry import Registry
from serving.replica import Replica, State
from tests.benchmarks.routing.policy import NOBODY, Decision, MetricsReader, Refused, Usage
from tests.benchmarks.routing.profiles import BLOCK_TOKENS, Fleet, Member
from tests.benchmarks.routing.workloads import Turn
from tests.gateway.proxy.dispatching import lease_or_wait

ALIAS = "model"
# The gateway counts bytes: about 4 for each token of a prompt, at random up to a tenth more or less.
BYTES_PER_TOKEN, BYTES_SPREAD = 4.0, 0.1
# Blocks of the engine in one block of the gateway.
_BLOCKS_IN_ONE = int(BLOCK_BYTES / BYTES_PER_TOKEN) // BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of an operator: when to spill, and how long a request may wait for a replica.

    `named`: clients name their conversations; otherwise each is known by its opening, or by the model's first turn.
    """

    spill: Spill = DEFAULT_SPILL
    patience_seconds: float = 30.0
    measured: bool = True  # there is a capacity.json
    named: bool = True
    intervals: PollIntervals = DEFAULT_INTERVALS


class Ours:
    """quantgate; created on the loop that it runs on."""

    name = "quantgate"

    def __init__(self, fleet: Fleet, measurements: Mapping[str, Measurement], options: Options) -> None:
        self._options = options
        self.intervals = options.intervals
        clock = asyncio.get_running_loop().time
        self._registry = Registry(clock)
        self._targets = targets_of(fleet, options.spill)
        speeds = _speeds(measurements, fleet) if options.measured else {}
        self._loads = LoadTracker(self._registry.in_flight, speeds, clock)
        self.dispatch = Dispatcher(self._registry, self._loads, Metrics(), clock=clock)
        self._replicas = {member.id: _replica(member) for member in fleet.members}
        self._leases: dict[int, Lease] = {}
        self._spilling: frozenset[object] = frozenset()
        self._switches: list[float] = []
        self.dispatch.__enter__()  # until the loop ends

    async def choose(self, turn: Turn, now: float, tried: frozenset[str] = NOBODY) -> Decision:
        """Lease a replica; Refused if all are overloaded or none is ready."""
        failure = UpstreamDisconnected("a replica died") if tried else None
        request = self._request(turn, self.dispatch.next_turn())
        try:
            lease = await lease_or_wait(
                self.dispatch, request, self._options.patience_seconds, tried=tried, failure=failure
            )
        except (Overloaded, Unavailable) as error:
            return Refused(math.ceil(error.retry_after_seconds))
        except UpstreamDisconnected:
            return Refused(1.0)
        finally:
            self._note_switches(now)
        self._leases[turn.key] = lease
        return lease.replica.id

    def would_take(self, turn: Turn, now: float) -> bool:
        """Decide without changing any state."""
        request = self.dispatch.affinity.refreshed(self._request(turn, turn.key))
        candidate = decide(request, self.dispatch.cluster, now).candidate
        return candidate is not None and not candidate.exceeds(self._options.patience_seconds)

    def sent(self, turn: Turn, replica: str, now: float) -> None:
        """Do nothing: the lease has counted it."""

    def first_token(self, turn: Turn, replica: str, now: float) -> None:
        """Record that its prompt has been read."""
        self._leases[turn.key].in_flight.first_token()

    def finished(self, turn: Turn, replica: str, usage: Usage, now: float) -> None:
        """Release the lease with the tokens that the engine counted."""
        lease = self._leases.pop(turn.key)
        lease.succeeded()
        lease.prompt_tokens, lease.answer_tokens = usage.prompt_tokens, usage.answer_tokens
        lease.release()

    def failed(self, turn: Turn, replica: str, now: float) -> None:
        """Release the lease as a failure of the replica."""
        lease = self._leases.pop(turn.key)
        lease.failed()
        lease.release()

    def polled(self, replica: str, poll: EngineMetrics) -> None:
        """Apply a poll; one that does not tell the load counts as failed."""
        if self._replicas[replica].external is not None:
            return  # nobody polls it
        if poll.tells_load:
            self.dispatch.polled(replica, poll.at_seconds, poll)
        else:
            self.dispatch.poll_failed(replica)

    def unanswered(self, replica: str, now: float) -> None:
        self.dispatch.poll_failed(replica)

    def busy(self, replica: str) -> bool:
        return self.dispatch.busy(replica)

    def readers(self) -> Sequence[MetricsReader]:
        return (self,)

    def ready(self, replicas: Sequence[str], now: float) -> None:
        for name, replica in self._replicas.items():
            self._registry.put(replica, State.READY if name in replicas else State.FAILED)

    def switches(self) -> Sequence[float]:
        """When a gate opened or closed."""
        return self._switches

    def _request(self, turn: Turn, number: int) -> RoutingRequest:
        floors = () if turn.floor is None else (Floor(top1_agreement=turn.floor),)
        prompt_bytes = round(turn.prompt_tokens * BYTES_PER_TOKEN * (1 + BYTES_SPREAD * _chance(turn.key)))
        target = self._target_of(turn)
        session, placement = self._conversation(turn)
        first_later = 1 if self._options.named else 2  # the second turn is the first with a session
        return RoutingRequest(
            target,
            target.permitted_rungs(floors, None),
            number,
            request_id=str(turn.key),
            streams=True,
            prompt_tokens=prompt_bytes / self.dispatch.affinity.bytes_per_token(target.name),
            prompt_bytes=prompt_bytes,
            blocks=turn.prompt_blocks[_BLOCKS_IN_ONE - 1 :: _BLOCKS_IN_ONE][:MAX_BLOCKS],
            session=session,
            later=turn.number >= first_later and self.dispatch.affinity.placement(turn.session) is None,
            floors=floors,
            placement=placement,
        )

    def _target_of(self, turn: Turn) -> Target:
        """Every conversation is of one alias."""
        return self._targets[crc32(turn.session.encode()) % len(self._targets)]

    def _conversation(self, turn: Turn) -> tuple[str | None, Placement | None]:
        """What gateway.proxy.routing_features finds: `Affinity.refreshed` looks the placement of the session up."""
        if self._options.named:
            return turn.session, None
        target = self._target_of(turn)
        spilling_seconds, known = self.dispatch.spilled_lately_seconds(target.name), self.dispatch.affinity.placement
        if spilling_seconds is None or known(turn.session) is not None:
            return turn.session if turn.number else None, None
        opening = f"opening {turn.session}"
        if not turn.number:
            return opening, None
        began_before = spilling_seconds < PAUSE_SECONDS
        placement = known(opening) or (Placement(target.rungs[0].name, "") if began_before else None)
        return turn.session, placement

    def _note_switches(self, now: float) -> None:
        spilling = frozenset(key for key, gate in self.dispatch.cluster.gates.items() if gate.spilling)
        if spilling != self._spilling:
            self._switches += [now] * len(spilling ^ self._spilling)
            self._spilling = spilling


def _chance(key: int) -> float:
    """Hash a key to a number from -1 to 1 (Knuth's multiplicative hash)."""
    return (key * 2654435761 % 2**32) / 2**31 - 1


def targets_of(fleet: Fleet, spill: Spill) -> list[Target]:
    """Every alias with a ladder of its own variants."""
    variants = {member.variant: _variant(member) for member in fleet.members}
    aliases = {}
    for alias in range(fleet.aliases):
        ladder = dict.fromkeys(member.variant for rung in fleet.rungs for member in fleet.of(rung, alias))
        aliases[f"{ALIAS}.{alias}" if alias else ALIAS] = AliasSettings(ladder=tuple(ladder), spill=spill)
    catalog = Catalog(aliases, variants)
    return [catalog.resolve(name) for name in aliases]


def _variant(member: Member) -> Variant:
    quality = QualityMeasures("measured", kl_mean=1 - member.agreement, top1_agreement=member.agreement)
    return Variant(member.variant, member.precision, quality)


def _replica(member: Member) -> Replica:
    outside = ExternalModel(f"provider/{member.id}") if member.precision == EXTERNAL else None
    return Replica(member.id, member.variant, member.precision, f"http://{member.id}", ALIAS, external=outside)


def _speeds(measurements: Mapping[str, Measurement], fleet: Fleet) -> dict[str, SpeedProfile]:
    speeds = {rung: SpeedProfile.measured(measurements[rung]) for rung in fleet.rungs if rung in measurements}
    known = {member.variant: speeds.get(member.precision) for member in fleet.members}
    return {variant: speed for variant, speed in known.items() if speed is not None}
