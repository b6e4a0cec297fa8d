"""Model name -> the variants that may answer it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from config.schema import NO_FLOOR, AliasSettings, Floor, TimeoutSettings
from config.variant import Variant
from gateway.errors import UnknownModel

USUAL_TIMEOUTS = TimeoutSettings()


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name stands for: an alias with its ladder, or one pinned variant."""

    name: str
    rungs: tuple[Variant, ...]
    floor: Floor
    pinned: bool
    think: Literal["auto", "prefix", "none"] = "auto"
    reasoning: Literal["parsed", "restored", "raw"] = "parsed"
    timeouts: TimeoutSettings = USUAL_TIMEOUTS


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
            rungs = tuple(self.variants[rung] for rung in alias.ladder)
            floor = NO_FLOOR if alias.floor == NO_FLOOR else alias.floor
            self._targets[name] = Target(name, rungs, floor, False, alias.think, alias.reasoning, alias.timeouts)

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
