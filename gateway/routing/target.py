"""A model name, and the rungs that may answer it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Literal

import msgspec

from config.schema import NO_FLOOR, AliasSettings, Floor, Spill, TimeoutSettings
from config.variant import Variant
from gateway.errors import FloorUnmet, UnknownModel
from gateway.routing.filters import FilterResult, Rejection, filter_failed, filter_rungs

DEFAULT_TIMEOUTS = TimeoutSettings()
DEFAULT_SPILL = Spill()
PIN = "@"  # in no name of an alias or a variant


class Timeouts(msgspec.Struct, frozen=True):
    """How long a replica's reply may take: to its first byte, from one byte to the next, and in all."""

    first_byte_seconds: float = 600.0
    idle_seconds: float = 600.0
    total_seconds: float = inf
    connect_seconds: float = 2.0
    shortest_seconds: float = 0.0  # of the first three

    def __post_init__(self) -> None:
        shortest = min(self.first_byte_seconds, self.idle_seconds, self.total_seconds)
        msgspec.structs.force_setattr(self, "shortest_seconds", shortest)


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name stands for: an alias with its ladder, or one pinned variant.

    A rung is a variant: `rungs` is the ladder without those that are `excluded` by their own evaluation; `permitted`
    are the rungs that satisfy the alias' own floor. `cache_salt` differs between targets whose prompts are not cached
    together: a LoRA adapter has a KV cache of its own, in the same engine. `canary` is the new variant, if this is the
    ladder of a rollout's canary arm.
    """

    name: str
    rungs: tuple[Variant, ...]
    floor: Floor
    pinned: bool
    think: Literal["auto", "prefix", "none"] = "auto"
    reasoning: Literal["parsed", "restored", "raw"] = "parsed"
    timeouts: TimeoutSettings = DEFAULT_TIMEOUTS
    spill: Spill = DEFAULT_SPILL
    trust_declared: bool = False
    excluded: tuple[Rejection, ...] = ()
    canary: str | None = None
    permitted: tuple[Variant, ...] = field(init=False, repr=False, compare=False)
    stream_timeouts: Timeouts = field(init=False, repr=False, compare=False)
    unary_timeouts: Timeouts = field(init=False, repr=False, compare=False)
    cache_salt: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        permitted = self.rungs if self.floor is NO_FLOOR else self.filter((), None).permitted
        object.__setattr__(self, "permitted", permitted)
        loras = [rung.name for rung in self.rungs if rung.lora is not None]
        object.__setattr__(self, "cache_salt", ",".join(loras).encode())
        for stream in (True, False):
            name = "stream_timeouts" if stream else "unary_timeouts"
            object.__setattr__(self, name, reply_timeouts(self.timeouts, stream=stream))

    def filter(self, floors: Sequence[Floor], precisions: frozenset[str] | None) -> FilterResult:
        """Filter the ladder by the alias' floor and a request's floors and precisions."""
        limits = [floor for floor in (self.floor, *floors) if floor is not NO_FLOOR]
        result = filter_rungs(self.rungs, limits, precisions, trust_declared=self.trust_declared)
        return FilterResult(result.permitted, (*result.rejected, *self.excluded))

    def permitted_rungs(self, floors: Sequence[Floor], precisions: frozenset[str] | None) -> tuple[Variant, ...]:
        """Return the rungs that satisfy alias, key and request; FloorUnmet names why each of the others does not."""
        permitted = self.permitted
        limits = [floor for floor in floors if floor is not NO_FLOOR]
        if limits or precisions is not None:
            permitted = filter_rungs(permitted, limits, precisions, trust_declared=self.trust_declared).permitted
        if not permitted:
            raise FloorUnmet(_no_variant(self, self.filter(floors, precisions).rejected), param="model")
        return permitted


@dataclass(frozen=True, slots=True)
class Catalog:
    """Every name that a client may send as `model`."""

    aliases: Mapping[str, AliasSettings]
    variants: Mapping[str, Variant]
    pins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _targets: dict[str, Target] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name, variant in self.variants.items():
            self._targets[name] = Target(name, (variant,), NO_FLOOR, pinned=True)
        for name, alias in self.aliases.items():
            self._targets[name] = _target(name, alias, tuple([self.variants[rung] for rung in alias.ladder]))

    def resolve(self, model: str) -> Target:
        """Look a model name up; UnknownModel if it is neither an alias nor a variant, nor `ALIAS@VARIANT`."""
        target = self._targets.get(model)
        if target is None and PIN in model:
            target = self._pinned(model)
        if target is None:
            what = f"the model {model[:100]!r} does not exist; GET /v1/models lists the names"
            raise UnknownModel(what, param="model")
        return target

    def names(self) -> list[str]:
        """All names, aliases first."""
        return [*self.aliases, *self.variants]

    def canary(self, alias: str, ladder: Sequence[str], new: str) -> Target:
        """Make the target of a rollout's canary arm: an alias' settings with another ladder."""
        rungs = tuple([self.variants[name] for name in ladder])
        return replace(_target(alias, self.aliases[alias], rungs), canary=new)

    def pin(self, alias: str, variants: Sequence[str]) -> None:
        """Let clients pin these variants of an alias as `ALIAS@VARIANT`, beside those of its ladder."""
        self.pins[alias] = tuple(variants)

    def _pinned(self, model: str) -> Target | None:
        """Make the target of `ALIAS@VARIANT`: one variant, with the settings of the alias but not its floor."""
        alias, _, name = model.rpartition(PIN)
        settings = self.aliases.get(alias)
        if settings is None or name not in (*settings.ladder, *self.pins.get(alias, ())) or name not in self.variants:
            return None
        plain = settings.model_copy(update={"admit_failed": True})
        made = replace(_target(model, plain, (self.variants[name],)), floor=NO_FLOOR, pinned=True)
        return self._targets.setdefault(model, made)


def reply_timeouts(timeouts: TimeoutSettings, *, stream: bool) -> Timeouts:
    """Return how long a replica may take; a unary answer comes at its end, so only the total limits it. 0: no limit."""
    total, connect = timeouts.total_seconds or inf, timeouts.connect_seconds
    if not stream:
        return Timeouts(total, total, total, connect)
    return Timeouts(timeouts.first_byte_seconds or inf, timeouts.idle_seconds or inf, total, connect)


def _no_variant(target: Target, rejected: Sequence[Rejection]) -> str:
    return f"no variant of {target.name!r} is good enough ({'; '.join(map(str, rejected))})"


def _target(name: str, alias: AliasSettings, ladder: tuple[Variant, ...]) -> Target:
    ladder = tuple(sorted(ladder, key=lambda rung: rung.is_external))  # a rollout may name them in any order
    result = FilterResult(ladder, ()) if alias.admit_failed else filter_failed(ladder)
    return Target(
        name,
        result.permitted,
        NO_FLOOR if alias.floor == NO_FLOOR else alias.floor,
        False,
        alias.think,
        alias.reasoning,
        alias.timeouts,
        alias.spill,
        alias.trust_declared,
        result.rejected,
    )
