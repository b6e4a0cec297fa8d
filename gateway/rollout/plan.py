"""Plans of rollouts: what an operator may choose, and what a rollout carries from its start to its end.

A plan is fixed when the rollout starts; edits of the configuration or of the plan file take effect for the next one.
"""

import math
import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from config.field_types import MAX_SECONDS, Name, Seconds, Share
from gateway.rollout.gates import (
    DEFAULT_GATES,
    EVENT_MARGIN,
    EventGate,
    EventSettings,
    GateSettings,
    MeanSettings,
    new_gates,
)

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
GATE_NAMES = tuple(settings.name for settings in DEFAULT_GATES)
LENGTH_GATES = frozenset({"longer_answer", "shorter_answer", "longer_reasoning", "shorter_reasoning"})


def parse_seconds(value: object) -> object:
    """Parse `90`, `300s`, `5m` or `1h` as seconds; ValueError for other text. Other types are left to pydantic."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smhd]?)", value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a valid duration; write a number with s, m, h or d")
    return float(match[1]) * UNITS[match[2]]


Duration = Annotated[float, BeforeValidator(parse_seconds), Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]
Percent = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]


class PlanTable(BaseModel):
    """Base of all tables of a plan: frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Hook(PlanTable):
    """A command or a URL that gets the transitions: JSON on its stdin, or as the body of a POST."""

    command: tuple[str, ...] | None = None
    url: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    events: tuple[str, ...] = ()  # empty: all
    timeout_seconds: Seconds = 10.0

    @model_validator(mode="after")
    def _one_target(self) -> "Hook":
        if (self.command is None) == (self.url is None):
            raise ValueError("a hook has either a command or a url")
        return self


class QualityBudget(PlanTable):
    """How much worse than the replaced variant the new one may have been measured, relative to their parent."""

    kl_mean: Annotated[float, Field(ge=0)] = 0.01
    top1_agreement: Share = 0.01
    perplexity_ratio: Annotated[float, Field(ge=0)] = 0.01


class Tolerances(PlanTable):
    """What the gates accept: the ratio of events, the relative increase of times, and the change of lengths."""

    events: Annotated[float, Field(ge=1, le=10)] = 1.1
    times: Annotated[float, Field(ge=0, le=0.15)] = 0.03
    lengths: Annotated[float, Field(ge=0, le=0.1)] = 0.05


class Effects(PlanTable):
    """What a gate that passes has ruled out; larger effects need fewer conversations.

    `events` is a difference of rates (5/3 of it for late first tokens), the others are relative changes.
    """

    events: Annotated[float, Field(gt=0, le=0.5)] = EVENT_MARGIN
    times: Annotated[float, Field(gt=0, le=4)] = 0.2
    lengths: Annotated[float, Field(gt=0, le=4)] = 0.15


class PlanSettings(PlanTable):
    """The options of a rollout, as in a plan file; those of the command line replace them.

    `steps` are percentages of conversations. `skip` names gates that are not judged. `compare: false` skips the
    comparison with the replaced variant: for a fix forward, when that is broken itself.
    """

    steps: Annotated[tuple[Percent, ...], Field(min_length=1, max_length=50)] = (1.0, 5.0, 25.0, 50.0, 100.0)
    step_seconds: Duration = 300.0
    shadow: Share = 0.0
    shadow_requests: Annotated[int, Field(ge=30, le=100_000)] = 100
    shadow_budget: Annotated[float, Field(ge=0)] = 0.02  # nats per token
    on_fail: Literal["rollback", "pause"] = "rollback"
    keep: Duration = 3600.0
    compare: bool = True
    budget: QualityBudget = QualityBudget()
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    tolerances: Tolerances = Tolerances()
    effects: Effects = Effects()
    skip: tuple[str, ...] = ()
    min_conversations: Annotated[int, Field(ge=1, le=10**6)] = 20  # of the canary, in each step
    stall_seconds: Duration = 600.0
    preflight_seconds: Duration = 1800.0
    start_seconds: Duration = 3600.0
    smoke_seconds: Duration = 900.0
    shadow_seconds: Duration = 3600.0
    evidence_seconds: Duration = 4 * 3600.0
    drain_seconds: Duration = 300.0
    hold_seconds: Duration = 900.0
    pause_seconds: Duration = 86400.0
    hooks: tuple[Hook, ...] = ()

    @model_validator(mode="after")
    def _ordered(self) -> "PlanSettings":
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError("steps must increase, for example [1, 5, 25, 50, 100]")
        if unknown := sorted(set(self.skip) - set(GATE_NAMES)):
            raise ValueError(f"skip: no gate {unknown[0]!r}; there are: {', '.join(GATE_NAMES)}")
        for name in ("times", "lengths"):
            accepted, effect = getattr(self.tolerances, name), getattr(self.effects, name)
            if effect <= accepted:
                raise ValueError(f"effects.{name}: {effect:g} must exceed tolerances.{name}, {accepted:g}")
        return self

    @property
    def weights(self) -> tuple[float, ...]:
        """The share of conversations in each step."""
        return tuple(percent / 100 for percent in self.steps)

    def gates(self) -> tuple[GateSettings, ...]:
        """The gates that are judged, with the plan's tolerances and effects."""
        return tuple(
            [_with(self.tolerances, self.effects, gate) for gate in DEFAULT_GATES if gate.name not in self.skip]
        )


class RolloutPlan(PlanTable):
    """A rollout of an alias: from the ladder `stable` to the ladder `final`.

    Conversations of the canary arm use `canary` meanwhile: it has the new variant directly above the one that it
    replaces, which answers where the new one cannot. `fingerprint` identifies the new variant's content: replicas count
    only while the name stands for that. `new` and `old` are the variants that are compared.
    """

    alias: Name
    new: Name
    old: Name
    fingerprint: str
    old_fingerprint: str
    stable: Annotated[tuple[Name, ...], Field(min_length=1)]
    canary: Annotated[tuple[Name, ...], Field(min_length=1)]
    final: Annotated[tuple[Name, ...], Field(min_length=1)]
    settings: PlanSettings = PlanSettings()

    @property
    def added(self) -> bool:
        """Whether the new variant is new to the ladder."""
        return self.new not in self.stable


def replacement(ladder: Sequence[str], new: str, old: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the canary's ladder and the final one, if a new variant replaces an old one."""
    place = list(ladder).index(old)
    canary = (*ladder[:place], new, *ladder[place:])
    return canary, (*ladder[:place], new, *ladder[place + 1 :])


def compared(before: Sequence[str], after: Sequence[str]) -> tuple[str, str]:
    """Return the old and the new variant of a change of ladder: of the first places that differ."""
    for old, new in zip(before, after, strict=False):
        if old != new:
            return old, new
    return before[-1], after[-1]


def expected_minutes(settings: PlanSettings, conversations_per_second: float) -> tuple[float, ...]:
    """Estimate how long each step takes at a traffic, in minutes; inf without traffic.

    The last step that has two arms lasts until the gates have enough conversations of both: events need what the
    one-sample test takes at 1 % of events, means what the normal mixture takes at a spread of 0.5 (log).
    """
    minutes, gathered = [], 0.0
    last = _last_with_two_arms(settings)
    needed = needed_conversations(settings)
    for place, weight in enumerate(settings.weights):
        rate = conversations_per_second * weight
        seconds = max(settings.step_seconds, settings.min_conversations / rate if rate else math.inf)
        if place == last:
            missing = max(needed - gathered, 0.0)
            seconds = max(seconds, missing / (rate * (1 - weight)) if rate and weight < 1 else seconds)
        gathered += seconds * rate if rate else 0.0
        minutes.append(seconds / 60)
    return tuple(minutes)


def needed_conversations(settings: PlanSettings, spread: float = 0.5) -> int:
    """Estimate how many conversations of the canary the gates need, if the variants are the same."""
    needed = 0
    for gate in new_gates(settings.gates(), len(settings.steps), settings.alpha):
        if isinstance(gate, EventGate):
            needed = max(needed, gate.needed_conversations())
        else:
            needed = max(needed, math.ceil(gate.target * spread**2))
    return needed


def _last_with_two_arms(settings: PlanSettings) -> int:
    return max((place for place, weight in enumerate(settings.weights) if weight < 1), default=0)


def _with(tolerances: Tolerances, effects: Effects, gate: GateSettings) -> GateSettings:
    if isinstance(gate, EventSettings):
        return EventSettings(gate.name, tolerances.events, gate.margin * effects.events / EVENT_MARGIN)
    is_length = gate.name in LENGTH_GATES
    margin = math.log1p(tolerances.lengths if is_length else tolerances.times)
    effect = math.log1p(effects.lengths if is_length else effects.times)
    return MeanSettings(gate.name, gate.quantity, margin, effect, gate.sign)
