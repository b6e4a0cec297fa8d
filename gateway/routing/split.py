"""Weighted members of a rung, and which of them a conversation is drawn to.

A rung usually has one member. While a rollout runs it has two: the stable variant first, then the canary. A draw
depends on the conversation and the weights only, so every gateway process makes the same one, and a conversation stays
with its member as long as the weights allow.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

from config.variant import Variant

Weights = Mapping[str, float]  # by the name of a rung's variant
RungKey = tuple[str, str]  # an alias, and the name of one of its rungs

_DRAW_BYTES = 8


@dataclass(frozen=True, slots=True)
class Rung:
    """A place in a ladder: weighted variants, stable first.

    `only` is the variant of a rung with one member. A rung that lost members to a floor (`filtered`) has none: the
    weights still decide whether the member that is left may answer.
    """

    name: str
    members: tuple[tuple[Variant, float], ...]
    filtered: bool = False
    only: Variant | None = field(init=False, repr=False, compare=False)
    names: tuple[str, ...] = field(init=False, repr=False, compare=False)  # of the variants
    external: bool = field(init=False, repr=False, compare=False)  # another provider runs its variants

    def __post_init__(self) -> None:
        alone = len(self.members) == 1 and not self.filtered
        object.__setattr__(self, "only", self.members[0][0] if alone else None)
        object.__setattr__(self, "names", tuple([variant.name for variant, _ in self.members]))
        object.__setattr__(self, "external", any(variant.is_external for variant, _ in self.members))

    @classmethod
    def of(cls, variant: Variant) -> "Rung":
        """Make a rung of one variant, named like it."""
        return cls(variant.name, ((variant, 1.0),))

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants of all members, stable first."""
        return tuple([variant for variant, _ in self.members])

    def has(self, variant_name: str) -> bool:
        """Return whether a variant is a member."""
        return variant_name in self.names


@dataclass(frozen=True, slots=True)
class RungWeights:
    """Weights that replace those of the configuration, by alias and rung; `revision` grows with every change."""

    revision: int = 0
    by_rung: Mapping[RungKey, Weights] = field(default_factory=dict)


NO_WEIGHTS = RungWeights()


def variant_names(rungs: Iterable[Rung]) -> tuple[str, ...]:
    """The names of all members of some rungs."""
    return tuple([name for rung in rungs for name in rung.names])


def choose_member(rung: Rung, key: str, weights: Weights | None = None) -> Variant | None:
    """Draw a member of a rung by the hash of a conversation's key, in proportion to the weights.

    `weights`, by variant, replace the rung's own; a member that they do not name has weight 0, and is never drawn.
    Returns None if every member has weight 0.
    """
    if rung.only is not None:
        return rung.only
    shares = [weight if weights is None else weights.get(variant.name, 0.0) for variant, weight in rung.members]
    point = _uniform(f"{rung.name}\0{key}") * sum(shares)
    drawn = None
    for (variant, _), share in zip(rung.members, shares, strict=True):
        if share > 0:
            drawn = variant
            if point < share:
                break
        point -= share
    return drawn


def _uniform(text: str) -> float:
    """Hash a text to a number in [0, 1)."""
    digest = blake2b(text.encode(), digest_size=_DRAW_BYTES).digest()
    return int.from_bytes(digest, "big") / float(2 ** (8 * _DRAW_BYTES))
