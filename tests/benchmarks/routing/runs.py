"""What is run and what came of it: scenarios with their faults, and the outcome of every turn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tests.benchmarks.routing.profiles import Fleet
from tests.benchmarks.routing.workloads import Conversation, Turn

Metric = Literal["running", "waiting", "kv_usage"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a replica; `factor` is of "slow", `metric` of "lose metric"."""

    at_seconds: float
    replica: str
    kind: Literal["kill", "restart", "slow", "stop polls", "resume polls", "lose metric"]
    factor: float = 1.0
    metric: Metric = "waiting"


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything but the policy. A refused client comes back when told to, at most `most_asks` times in all."""

    fleet: Fleet
    conversations: Sequence[Conversation]
    seconds: float
    faults: Sequence[Fault] = ()
    detection_seconds: float = 1.0  # from a death or a restart until health checks tell
    most_tries: int = 3
    most_asks: int = 3
    seed: int = 1


@dataclass(slots=True)
class Refusal:
    """One 429: what it told, and when the same turn would have been taken, had it asked all the time."""

    at_seconds: float
    told_seconds: float
    really_seconds: float | None = None


@dataclass(eq=False, slots=True)
class Outcome:
    """What became of a turn; times are None where it never came so far."""

    turn: Turn
    asked_at: float
    replica: str = ""
    precision: str = ""
    agreement: float = 0.0
    sent_at: float | None = None
    first_at: float | None = None
    ended_at: float | None = None
    cached_tokens: int = 0
    tries: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """What a policy made of a scenario."""

    policy: str
    scenario: Scenario
    outcomes: Sequence[Outcome]
    switches: Sequence[float]
    preemptions: int
    hit_share: float
