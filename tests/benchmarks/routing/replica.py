"""One replica of a simulated fleet."""

from dataclasses import dataclass, field

from gateway.routing.engine_metrics import EngineMetrics
from tests.benchmarks.routing.engine import Engine, Job
from tests.benchmarks.routing.profiles import Member
from tests.benchmarks.routing.runs import Metric, Outcome


@dataclass(slots=True)
class Replica:
    """One engine of a simulated fleet, what it answers, and what is wrong with it."""

    member: Member
    engine: Engine
    jobs: dict[Job, Outcome] = field(default_factory=dict)
    alive: bool = True
    stepping: bool = False
    life: int = 0  # a step that a dead engine had planned is nobody's
    polled: bool = True
    lost: set[Metric] = field(default_factory=set)

    def poll(self, now: float) -> EngineMetrics:
        """What the gateway reads off /metrics now."""
        gauges, lost = self.engine.gauges, self.lost
        return EngineMetrics(
            at_seconds=now,
            running=None if "running" in lost else float(gauges.running),
            waiting=None if "waiting" in lost else float(gauges.waiting),
            kv_usage=None if "kv_usage" in lost else gauges.kv_usage,
            kv_capacity_tokens=self.member.profile.kv_capacity_tokens,
            read_tokens=float(gauges.prompt_tokens),
            generated_tokens=float(gauges.generated_tokens),
        )
