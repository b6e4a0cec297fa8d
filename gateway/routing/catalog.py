"""Model name -> the variants that may answer it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from config.schema import AliasSettings, Floor
from config.variant import Variant
from gateway.errors import UnknownModel


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name stands for: an alias with its ladder, or one pinned variant."""

    name: str
    rungs: tuple[Variant, ...]
    floor: Floor
    pinned: bool
    think: Literal["auto", "prefix", "none"] = "auto"
    reasoning: Literal["parsed", "restored", "raw"] = "parsed"


@dataclass(frozen=True, slots=True)
class Catalog:
    """Every name that a client may send as `model`."""

    aliases: Mapping[str, AliasSettings]
    variants: Mapping[str, Variant]

    def resolve(self, model: str) -> Target:
        """Look a model name up; UnknownModel if it is neither an alias nor a variant."""
        alias = self.aliases.get(model)
        if alias is not None:
            rungs = tuple(self.variants[name] for name in alias.ladder)
            return Target(model, rungs, alias.floor, False, alias.think, alias.reasoning)
        variant = self.variants.get(model)
        if variant is not None:
            return Target(model, (variant,), Floor(), pinned=True)
        raise UnknownModel(f"the model {model[:100]!r} does not exist; GET /v1/models lists the names", param="model")

    def names(self) -> list[str]:
        """All names, aliases first."""
        return [*self.aliases, *self.variants]
