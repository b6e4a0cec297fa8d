"""Model name -> the variants that may answer it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from config.schema import NO_FLOOR, AliasSettings, Floor, Spill, TimeoutSettings
from config.variant import Variant
from gateway.errors import UnknownModel
from gateway.routing.filters import FilterResult, Rejection, filter_failed, filter_variants

USUAL_TIMEOUTS = TimeoutSettings()
USUAL_SPILL = Spill()


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name stands for: an alias with its ladder, or one pinned variant.

    `rungs` is the ladder without those that are shut out, `permitted` those of them that meet the alias' own floor.
    """

    name: str
    rungs: tuple[Variant, ...]
    floor: Floor
    pinned: bool
    think: Literal["auto", "prefix", "none"] = "auto"
    reasoning: Literal["parsed", "restored", "raw"] = "parsed"
    timeouts: TimeoutSettings = USUAL_TIMEOUTS
    spill: Spill = USUAL_SPILL
    trust_declared: bool = False
    excluded: tuple[Rejection, ...] = ()
    permitted: tuple[Variant, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        permitted = self.rungs if self.floor is NO_FLOOR else self.filter_variants((), None).kept
        object.__setattr__(self, "permitted", permitted)

    def filter_variants(self, floors: tuple[Floor, ...], precisions: frozenset[str] | None) -> FilterResult:
        """Tell who may answer a request with such floors and precisions, and of the whole ladder who may not."""
        limits = [floor for floor in (self.floor, *floors) if floor is not NO_FLOOR]
        told = filter_variants(self.rungs, limits, precisions, trust_declared=self.trust_declared)
        return FilterResult(told.kept, (*told.refused, *self.excluded))


@dataclass(frozen=True, slots=True)
class Catalog:
    """Every name that a client may send as `model`."""

    aliases: Mapping[str, AliasSettings]
    variants: Mapping[str, Variant]
    _targets: dict[str, Target] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name, variant in self.variants.items():
            self._targets[name] = Target(name, (variant,), NO_FLOOR, pinned=True)
        for name, alias in self.aliases.items():
            self._targets[name] = _target(name, alias, tuple([self.variants[rung] for rung in alias.ladder]))

    def resolve(self, model: str) -> Target:
        """Look a model name up; UnknownModel if it is neither an alias nor a variant."""
        target = self._targets.get(model)
        if target is None:
            what = f"the model {model[:100]!r} does not exist; GET /v1/models lists the names"
            raise UnknownModel(what, param="model")
        return target

    def names(self) -> list[str]:
        """All names, aliases first."""
        return [*self.aliases, *self.variants]


def _target(name: str, alias: AliasSettings, ladder: tuple[Variant, ...]) -> Target:
    admitted = FilterResult(ladder, ()) if alias.admit_failed else filter_failed(ladder)
    return Target(
        name,
        admitted.kept,
        NO_FLOOR if alias.floor == NO_FLOOR else alias.floor,
        False,
        alias.think,
        alias.reasoning,
        alias.timeouts,
        alias.spill,
        alias.trust_declared,
        admitted.refused,
    )
