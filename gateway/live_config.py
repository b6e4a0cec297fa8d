"""The configuration that requests go by now. A reload puts another one in its place, whole and in one step."""

from collections.abc import Iterable
from dataclasses import dataclass

from config.schema import LimitSettings
from config.variant import Variant
from gateway.keys import Keys
from gateway.routing.catalog import Catalog


@dataclass(slots=True)
class LiveConfig:
    """What a request reads once, when it begins; only a reload writes it."""

    catalog: Catalog
    keys: Keys
    limits: LimitSettings

    def variants(self) -> Iterable[Variant]:
        """Every variant that is configured now."""
        return self.catalog.variants.values()

    def take(self, other: "LiveConfig") -> None:
        """Go by another configuration from the next request on."""
        self.catalog, self.keys, self.limits = other.catalog, other.keys, other.limits


def unserved_aliases(before: Catalog, after: Catalog, ready: Iterable[str]) -> list[str]:
    """Name the aliases of both that variants with ready replicas answer now, and none would answer afterwards."""
    there = frozenset(ready)
    return [
        name
        for name in before.aliases
        if name in after.aliases and there & _answering(before, name) and not there & _answering(after, name)
    ]


def _answering(catalog: Catalog, alias: str) -> frozenset[str]:
    return frozenset(variant.name for variant in catalog.resolve(alias).permitted)
