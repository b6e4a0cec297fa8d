"""Who of a ladder may not answer, and why; what is left keeps its order."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from config.schema import Floor
from config.variant import Variant


@dataclass(frozen=True, slots=True)
class Refusal:
    """One rung that may not answer."""

    variant: Variant
    why: str

    def __str__(self) -> str:
        return f"{self.variant.name}: {self.why}"


@dataclass(frozen=True, slots=True)
class Sifted:
    """A ladder in two: who may answer, and who may not."""

    kept: tuple[Variant, ...]
    refused: tuple[Refusal, ...]


def without_failed(ladder: Iterable[Variant]) -> Sifted:
    """Take out the variants whose own evaluation said no."""
    kept, refused = [], []
    for variant in ladder:
        failure = variant.failure
        if failure is None:
            kept.append(variant)
        else:
            refused.append(Refusal(variant, f"{failure} (an alias can take it: admit_failed)"))
    return Sifted(tuple(kept), tuple(refused))


def sifted(
    rungs: Iterable[Variant], floors: Sequence[Floor], precisions: frozenset[str] | None, *, trust_declared: bool
) -> Sifted:
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
            refused.append(Refusal(variant, why))
    return Sifted(tuple(kept), tuple(refused))
