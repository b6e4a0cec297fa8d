"""Several gateways in front of one fleet: each with its own state, and every turn at any of them."""

import random
from collections.abc import Sequence

from tests.benchmarks.routing.ours import Ours
from tests.benchmarks.routing.policy import NOBODY, Decision, MetricsReader, Usage
from tests.benchmarks.routing.workloads import Turn


class Gateways:
    """Gateways behind a load balancer that knows nothing of conversations."""

    def __init__(self, gateways: Sequence[Ours], seed: int = 1) -> None:
        self.name = f"{len(gateways)} gateways"
        self.gateways = gateways
        self._chance = random.Random(seed)
        self._asked: dict[int, Ours] = {}  # by turn

    async def choose(self, turn: Turn, now: float, tried: frozenset[str] = NOBODY) -> Decision:
        """Ask any gateway; the one that was asked before goes on with a turn that a replica has failed."""
        if not tried or turn.key not in self._asked:
            self._asked[turn.key] = self._chance.choice(self.gateways)
        return await self._asked[turn.key].choose(turn, now, tried)

    def would_take(self, turn: Turn, now: float) -> bool:
        return self._asked[turn.key].would_take(turn, now)

    def sent(self, turn: Turn, replica: str, now: float) -> None:
        self._asked[turn.key].sent(turn, replica, now)

    def first_token(self, turn: Turn, replica: str, now: float) -> None:
        self._asked[turn.key].first_token(turn, replica, now)

    def finished(self, turn: Turn, replica: str, usage: Usage, now: float) -> None:
        self._asked[turn.key].finished(turn, replica, usage, now)

    def failed(self, turn: Turn, replica: str, now: float) -> None:
        self._asked[turn.key].failed(turn, replica, now)

    def readers(self) -> Sequence[MetricsReader]:
        return self.gateways

    def ready(self, replicas: Sequence[str], now: float) -> None:
        for gateway in self.gateways:
            gateway.ready(replicas, now)

    def switches(self) -> Sequence[float]:
        """When a gate of any gateway opened or closed."""
        return sorted(at for gateway in self.gateways for at in gateway.switches())
