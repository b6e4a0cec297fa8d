"""The configuration in force for requests; a reload replaces it atomically."""

from collections.abc import Iterable
from dataclasses import dataclass

from config.schema import LimitSettings
from config.variant import Variant
from gateway.keys import Keys
from gateway.routing.catalog import Catalog


@dataclass(slots=True)
class LiveConfig:
    """Catalog, keys and limits in force. A request reads them when it starts; only a reload writes them."""

    catalog: Catalog
    keys: Keys
    limits: LimitSettings

    def variants(self) -> Iterable[Variant]:
        """All configured variants."""
        return self.catalog.variants.values()

    def replace(self, other: "LiveConfig") -> None:
        """Put another configuration in force, from the next request on."""
        self.catalog, self.keys, self.limits = other.catalog, other.keys, other.limits


def unserved_aliases(before: Catalog, after: Catalog, ready: Iterable[str]) -> list[str]:
    """Return the aliases in both catalogs that a ready variant can serve before the change but none after it.

    `ready` are the names of variants with a ready replica.
    """
    ready_names = frozenset(ready)
    return [
        name
        for name in before.aliases
        if name in after.aliases
        and ready_names & _permitted_variants(before, name)
        and not ready_names & _permitted_variants(after, name)
    ]


def _permitted_variants(catalog: Catalog, alias: str) -> frozenset[str]:
    return frozenset(variant.name for variant in catalog.resolve(alias).permitted)
