"""Who of a ladder may not answer, and why; what is left keeps its order."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from config.schema import Floor
from config.variant import Variant


@dataclass(frozen=True, slots=True)
class Rejection:
    """One rung that may not answer."""

    variant: Variant
    why: str

    def __str__(self) -> str:
        return f"{self.variant.name}: {self.why}"


@dataclass(frozen=True, slots=True)
class FilterResult:
    """A ladder in two: who may answer, and who may not."""

    kept: tuple[Variant, ...]
    refused: tuple[Rejection, ...]


def filter_failed(ladder: Iterable[Variant]) -> FilterResult:
    """Take out the variants whose own evaluation said no."""
    kept, refused = [], []
    for variant in ladder:
        failure = variant.failure
        if failure is None:
            kept.append(variant)
        else:
            refused.append(Rejection(variant, f"{failure} (an alias can take it: admit_failed)"))
    return FilterResult(tuple(kept), tuple(refused))


def filter_variants(
    rungs: Iterable[Variant], floors: Sequence[Floor], precisions: frozenset[str] | None, *, trust_declared: bool
) -> FilterResult:
    """Take out who misses a floor, or has a precision that isn't among those asked for; None: any will do."""
    kept, refused = [], []
    for variant in rungs:
        if precisions is not None and variant.precision not in precisions:
            why: str | None = f"precision {variant.precision} was not asked for"
        else:
            quality = variant.quality
            missed = (quality.shortfall(floor, trust_declared=trust_declared) for floor in floors)
            why = next(filter(None, missed), None)
        if why is None:
            kept.append(variant)
        else:
            refused.append(Rejection(variant, why))
    return FilterResult(tuple(kept), tuple(refused))
