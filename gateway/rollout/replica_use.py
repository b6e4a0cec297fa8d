"""Whose replicas are in use: a variant runs while a ladder or an active rollout needs it. Pure.

An adapter has no replicas of its own: those of its base variant serve it, and the base is what counts here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ReplicaUse:
    """The variants in use, those of them that are the new one of an active rollout, and the bases of adapters."""

    in_use: frozenset[str] = frozenset()
    new: frozenset[str] = frozenset()
    bases: Mapping[str, str] = field(default_factory=dict)

    def base(self, variant: str) -> str:
        """The variant whose replicas serve a variant: its base if it is an adapter, else itself."""
        return self.bases.get(variant, variant)

    def bases_of(self, variants: Iterable[str]) -> frozenset[str]:
        """The variants whose replicas serve a ladder."""
        return frozenset(map(self.base, variants))
