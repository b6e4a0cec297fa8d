"""The configuration that requests use now; a reload replaces it as a whole, in one step."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from config.schema import LimitSettings
from config.variant import Variant
from gateway.http.cors import Cors
from gateway.http.tls import ServerTls
from gateway.keys import Caller, Keys
from gateway.routing.target import Catalog, Target
from serving.registry import Registry

MAX_ROUTES = 10_000


@dataclass(frozen=True, slots=True)
class Route:
    """What a model name is to one API key: its target, and the rungs that satisfy alias and key, maybe none.

    `queue_seconds` is how long its requests may wait for a replica.
    """

    caller: Caller
    target: Target
    rungs: tuple[Variant, ...]
    queue_seconds: float


@dataclass(slots=True)
class LiveConfig:
    """What a request reads when it begins; only a reload writes it."""

    catalog: Catalog
    keys: Keys
    limits: LimitSettings
    cors: Cors | None = None
    media_domains: frozenset[str] = frozenset()  # domains that engines may load media from
    tls: ServerTls | None = None  # what new connections of clients are shown
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
        self.tls = other.tls or self.tls  # the port goes on with TLS until the next start

    def _resolve(self, caller: Caller, model: str) -> Route:
        # Checked before the lookup, so that a caller does not learn which other models exist.
        caller.check_model(model)
        target = self.catalog.resolve(model)
        wait_seconds = target.timeouts.queue_seconds
        queue_seconds = self.limits.queue_seconds if wait_seconds is None else wait_seconds
        if len(self._routes) >= MAX_ROUTES:
            self._routes.clear()
        rungs = target.filter((caller.floor,), None).permitted
        route = self._routes[caller.name, model] = Route(caller, target, rungs, queue_seconds)
        return route


def unserved_aliases(before: Catalog, after: Catalog, ready: Iterable[str], then: Iterable[str]) -> list[str]:
    """Name the aliases of both catalogs that ready variants answer under the first, and none under the second.

    `ready` are the variants with a ready replica now, `then` those with one that remains afterwards.
    """
    now, remaining = frozenset(ready), frozenset(then)
    return [
        name
        for name in before.aliases
        if name in after.aliases and now & _answering(before, name) and not remaining & _answering(after, name)
    ]


def nothing_remains(before: Catalog, after: Catalog, ready: Iterable[str], wanted: Iterable[str]) -> str | None:
    """Return why nothing that answers under the first catalog would under the second; None if something would.

    `ready` are the variants with a ready replica now, `wanted` those with a replica afterwards, ready or not. Without
    an alias that answers, the variants count.
    """
    now, then = frozenset(ready), frozenset(wanted)
    aliases = [name for name in before.aliases if now & _answering(before, name)]
    if aliases:
        if any(name in after.aliases and then & _answering(after, name) for name in aliases):
            return None
        return f"no alias that answers now would answer any more ({', '.join(aliases)})"
    variants = now & before.variants.keys()
    if variants and not variants & after.variants.keys() & then:
        return f"no variant that answers now would answer any more ({', '.join(sorted(variants))})"
    return None


def ready_variants(catalog: Catalog, registry: Registry) -> dict[str, list[str]]:
    """List for each alias the permitted variants that have a ready replica; without aliases, for each variant."""
    ready = registry.ready
    names = catalog.aliases or catalog.variants
    return {name: [rung.name for rung in catalog.resolve(name).permitted if rung.name in ready] for name in names}


def _answering(catalog: Catalog, alias: str) -> frozenset[str]:
    return frozenset(rung.name for rung in catalog.resolve(alias).permitted)
