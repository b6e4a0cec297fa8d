"""The configuration that requests use now; a reload replaces it as a whole, in one step."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from config.errors import ConfigError
from config.schema import LimitSettings
from config.variant import Variant
from gateway.http.cors import Cors
from gateway.keys import Caller, Keys
from gateway.routing.split import NO_WEIGHTS, Rung, RungWeights, variant_names
from gateway.routing.target import Catalog, Target

MAX_ROUTES = 10_000


@dataclass(frozen=True, slots=True)
class Route:
    """What a model name is to one API key: its target, and the rungs that satisfy alias and key, maybe none.

    `queue_seconds` is how long its requests may wait for a replica.
    """

    caller: Caller
    target: Target
    rungs: tuple[Rung, ...]
    variants: tuple[str, ...]  # the names of their members
    queue_seconds: float


@dataclass(slots=True)
class LiveConfig:
    """What a request reads when it begins; only a reload writes it."""

    catalog: Catalog
    keys: Keys
    limits: LimitSettings
    cors: Cors | None = None
    media_domains: frozenset[str] = frozenset()  # domains that engines may load media from
    _routes: dict[tuple[str | None, str], Route] = field(default_factory=dict, repr=False)

    def variants(self) -> Iterable[Variant]:
        """Every configured variant."""
        return self.catalog.variants.values()

    def route(self, caller: Caller, model: str) -> Route:
        """Resolve a model for a caller, once per configuration; NotAllowed or UnknownModel if it can't be."""
        route = self._routes.get((caller.name, model))
        if route is None or route.caller is not caller:
            route = self._resolve(caller, model)
        return route

    def replace(self, other: "LiveConfig") -> None:
        """Use another configuration from the next request on."""
        self.catalog, self.keys, self.limits, self._routes = other.catalog, other.keys, other.limits, {}
        self.cors, self.media_domains = other.cors, other.media_domains

    def _resolve(self, caller: Caller, model: str) -> Route:
        # Checked before the lookup, so that a caller does not learn which other models exist.
        caller.check_model(model)
        target = self.catalog.resolve(model)
        wait_seconds = target.timeouts.queue_seconds
        queue_seconds = self.limits.queue_seconds if wait_seconds is None else wait_seconds
        if len(self._routes) >= MAX_ROUTES:
            self._routes.clear()
        rungs = target.filter((caller.floor,), None).permitted
        route = self._routes[caller.name, model] = Route(caller, target, rungs, variant_names(rungs), queue_seconds)
        return route


@dataclass(slots=True)
class LiveWeights:
    """The weights of rungs with several members, apart from the configuration: a reload leaves them as they are.

    Their only writer is a rollout.
    """

    current: RungWeights = NO_WEIGHTS

    def replace(self, weights: RungWeights) -> None:
        """Use other weights from the next decision on; ConfigError if their revision is not newer."""
        if weights.revision <= self.current.revision:
            have, given = self.current.revision, weights.revision
            raise ConfigError(f"weights of revision {given} do not replace those of revision {have}; read them again")
        self.current = weights


def unserved_aliases(before: Catalog, after: Catalog, ready: Iterable[str]) -> list[str]:
    """Name the aliases of both catalogs that ready variants answer under the first, and none under the second."""
    there = frozenset(ready)
    return [
        name
        for name in before.aliases
        if name in after.aliases and there & _answering(before, name) and not there & _answering(after, name)
    ]


def _answering(catalog: Catalog, alias: str) -> frozenset[str]:
    return frozenset(variant.name for rung in catalog.resolve(alias).permitted for variant in rung.variants)
