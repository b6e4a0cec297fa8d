"""Our own policy: the gateway's dispatch as it is, with everything that it decides by, on the simulation's clock.

What the simulation stands in for is the network (requests, polls, health checks) and the reading of a request's bytes.
Engines are polled as often as gateway.proxy.load.polling says; a retry is not taken from the budget.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from config.capacity import Measurement
from config.schema import AliasSettings, Floor, Spill
from config.variant import QualityMeasures, Variant
from gateway.errors import Overloaded, Unavailable, UpstreamDisconnected
from gateway.observability.metrics import Metrics
from gateway.proxy.dispatcher import Dispatcher
from gateway.proxy.leases import Lease, Want
from gateway.proxy.load.tracker import LoadTracker
from gateway.routing.target import DEFAULT_SPILL, Catalog
from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.target import permitted_rungs
from gateway.routing.pick import decide
from gateway.routing.prefix_hash import BLOCK_BYTES, MAX_BLOCKS
from gateway.routing.request import Ask
from gateway.routing.speed import SpeedProfile
from serving.registry import Registry
from serving.replica import Replica, State
from tests.benchmarks.routing.policy import NOBODY, Decision, Refused, Usage
from tests.benchmarks.routing.profiles import BLOCK_TOKENS, Fleet, Member
from tests.benchmarks.routing.workloads import Turn

ALIAS = "model"
# The gateway knows bytes only: of a prompt about so many for each token, by chance a tenth more or less.
BYTES_PER_TOKEN, BYTES_SPREAD = 4.0, 0.1
# So many of the engine's blocks make one of the gateway's.
_BLOCKS_IN_ONE = int(BLOCK_BYTES / BYTES_PER_TOKEN) // BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Options:
    """What an operator sets: when to spill, and for how long a request may wait for a replica."""

    spill: Spill = DEFAULT_SPILL
    patience_seconds: float = 30.0
    measured: bool = True  # whether there is a capacity.json


class Ours:
    """quantgate; must be made on the loop that it runs on."""

    name = "quantgate"

    def __init__(self, fleet: Fleet, measurements: Mapping[str, Measurement], options: Options) -> None:
        self._options = options
        clock = asyncio.get_running_loop().time
        self._registry = Registry(clock)
        variants = {rung: _variant(fleet.only(rung).members[0]) for rung in fleet.rungs}
        alias = AliasSettings(ladder=fleet.rungs, spill=options.spill)
        self._target = Catalog({ALIAS: alias}, variants).resolve(ALIAS)
        speeds = _speeds(measurements, fleet.rungs) if options.measured else {}
        self._loads = LoadTracker(self._registry.in_flight, speeds, clock)
        self.dispatch = Dispatcher(self._registry, self._loads, Metrics(), clock=clock)
        self._replicas = {member.id: _replica(member) for member in fleet.members}
        self._leases: dict[int, Lease] = {}
        self._spilling: frozenset[object] = frozenset()
        self._switches: list[float] = []
        self.dispatch.__enter__()  # it lives as long as its loop

    async def choose(self, turn: Turn, now: float, tried: frozenset[str] = NOBODY) -> Decision:
        """Take a lease; an overload is a refusal, and so is that nobody is ready."""
        failure = UpstreamDisconnected("a replica died") if tried else None
        want = self._want(turn, self.dispatch.arrived())
        try:
            lease = await self.dispatch.lease(
                want, wait_seconds=self._options.patience_seconds, tried=tried, failure=failure
            )
        except (Overloaded, Unavailable) as error:
            return Refused(math.ceil(error.retry_after_seconds))
        except UpstreamDisconnected:
            return Refused(1.0)
        finally:
            self._note_switches(now)
        self._leases[turn.key] = lease
        return lease.choice.replica.id

    def would_take(self, turn: Turn, now: float) -> bool:
        """Decide, and leave everything as it is."""
        want = self._want(turn, turn.key)
        offer = decide(self._target, want.rungs, self.dispatch.memory.query(want), self.dispatch.scene, now).offer
        if offer is None:
            return False
        return not offer.comes_too_late(self._options.patience_seconds)

    def sent(self, turn: Turn, replica: str, now: float) -> None:
        """It is counted since it was chosen."""

    def first_token(self, turn: Turn, replica: str, now: float) -> None:
        """Its prompt has been read."""
        self._leases[turn.key].began()

    def finished(self, turn: Turn, replica: str, usage: Usage, now: float) -> None:
        """Give the lease back, with what the engine counted."""
        lease = self._leases.pop(turn.key)
        lease.succeeded()
        lease.prompt_tokens, lease.answer_tokens = usage.prompt_tokens, usage.answer_tokens
        self.dispatch.release(lease)

    def failed(self, turn: Turn, replica: str, now: float) -> None:
        """Hold it against the replica, and give the lease back."""
        lease = self._leases.pop(turn.key)
        lease.failed()
        self.dispatch.release(lease)

    def polled(self, replica: str, poll: EngineMetrics) -> None:
        """A page that doesn't tell the load is no poll."""
        if poll.tells_load:
            self.dispatch.polled(replica, poll.at_seconds, poll)
        else:
            self.dispatch.lost(replica)

    def unanswered(self, replica: str, now: float) -> None:
        self.dispatch.lost(replica)

    def ready(self, replicas: Sequence[str], now: float) -> None:
        for name, replica in self._replicas.items():
            self._registry.put(replica, State.READY if name in replicas else State.FAILED)

    def switches(self) -> Sequence[float]:
        """When a gate opened or closed."""
        return self._switches

    def _want(self, turn: Turn, number: int) -> Want:
        floors = () if turn.floor is None else (Floor(top1_agreement=turn.floor),)
        prompt_bytes = round(turn.prompt_tokens * BYTES_PER_TOKEN * (1 + BYTES_SPREAD * _chance(turn.key)))
        ask = Ask(
            prompt_tokens=prompt_bytes / self.dispatch.memory.bytes_per_token(ALIAS),
            answer_tokens=None,
            blocks=turn.prompt_blocks[_BLOCKS_IN_ONE - 1 :: _BLOCKS_IN_ONE][:MAX_BLOCKS],
            session=turn.session,
        )
        rungs = permitted_rungs(self._target, floors, None)
        return Want(self._target, rungs, number, ask, request_id=str(turn.key), streams=True, prompt_bytes=prompt_bytes)

    def _note_switches(self, now: float) -> None:
        spilling = frozenset(name for name, gate in self.dispatch.scene.gates.items() if gate.spilling)
        if spilling != self._spilling:
            self._switches += [now] * len(spilling ^ self._spilling)
            self._spilling = spilling


def _chance(key: int) -> float:
    """A number from -1 to 1 that is always the same for a key (Knuth's multiplicative hash)."""
    return (key * 2654435761 % 2**32) / 2**31 - 1


def _variant(member: Member) -> Variant:
    quality = QualityMeasures("measured", kl_mean=1 - member.agreement, top1_agreement=member.agreement)
    return Variant(member.precision, member.precision, quality)


def _replica(member: Member) -> Replica:
    return Replica(member.id, member.precision, member.precision, f"http://{member.id}", ALIAS)


def _speeds(measurements: Mapping[str, Measurement], rungs: Sequence[str]) -> dict[str, SpeedProfile]:
    found = {rung: SpeedProfile.measured(measurements[rung]) for rung in rungs}
    return {rung: speed for rung, speed in found.items() if speed is not None}
