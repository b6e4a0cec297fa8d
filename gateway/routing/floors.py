"""Which rungs may answer at all: none below the floor of alias, key or request, under any load or fault."""

from collections.abc import Sequence

from config.schema import NO_FLOOR, Floor
from config.variant import Variant
from gateway.errors import FloorUnmet
from gateway.routing.catalog import Catalog, Target
from gateway.routing.filters import Rejection, filter_variants


def permitted_rungs(
    target: Target, floors: tuple[Floor, ...], precisions: frozenset[str] | None
) -> tuple[Variant, ...]:
    """Keep the rungs that satisfy alias, key and request; FloorUnmet tells for each of the others why not."""
    kept = target.permitted
    limits = [floor for floor in floors if floor is not NO_FLOOR]
    if limits or precisions is not None:
        kept = filter_variants(kept, limits, precisions, trust_declared=target.trust_declared).kept
    if not kept:
        raise FloorUnmet(_nobody(target, target.filter_variants(floors, precisions).refused), param="model")
    return kept


def excluded_rungs(catalog: Catalog) -> list[str]:
    """Tell which rungs their aliases never choose, because their own evaluation said no."""
    targets = map(catalog.resolve, catalog.aliases)
    return [f"alias {target.name!r} never chooses {refusal}" for target in targets for refusal in target.excluded]


def unservable_aliases(catalog: Catalog) -> list[str]:
    """Tell which aliases nothing may answer, whatever is ready, and why."""
    targets = map(catalog.resolve, catalog.aliases)
    return [_nobody(target, target.filter_variants((), None).refused) for target in targets if not target.permitted]


def _nobody(target: Target, refused: Sequence[Rejection]) -> str:
    return f"no variant of {target.name!r} is good enough ({'; '.join(map(str, refused))})"
