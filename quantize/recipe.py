"""A recipe: everything that decides a variant's bytes, and the digest that names it."""

import hashlib
import json
import re
from dataclasses import dataclass
from importlib import metadata

from config.manifest import Scheme
from quantize.base import BaseModel
from quantize.calibration import Source
from quantize.errors import RecipeError

# Raise this when the same recipe would give other bytes because this package has changed.
_REVISION = 1


@dataclass(frozen=True, slots=True)
class Backend:
    """The program that solves for the integers."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """Base, scheme, calibration text and settings; equal digests mean equal variants."""

    base: BaseModel
    scheme: Scheme
    sources: tuple[Source, ...]
    samples: int
    max_tokens: int
    seed: int
    damp: float
    backend: Backend

    def digest(self) -> str:
        """Digest contents, never paths, so that every machine gives a recipe the same name."""
        told = {
            "revision": _REVISION,
            "base": self.base.digest,
            "scheme": self.scheme.model_dump(mode="json"),
            "calibration": sorted(source.sha256 for source in self.sources),
            "samples": self.samples,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "damp": self.damp,
            "backend": [self.backend.name, self.backend.version],
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @property
    def variant_id(self) -> str:
        """Name the variant: what it comes from, its precision, and 8 digits of the recipe's digest."""
        return f"{slug(self.base.name)}-{self.scheme.precision}-{self.digest()[:8]}"


def slug(name: str) -> str:
    """Reduce a name to lower-case letters, digits, dots and single hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "model"


def installed_backend(distribution: str = "gptqmodel") -> Backend:
    """Find the backend's version without importing it (an import takes 15 s)."""
    try:
        return Backend(distribution, metadata.version(distribution))
    except metadata.PackageNotFoundError:
        raise RecipeError(f"{distribution} is not installed; pip install 'quantgate[quantize]'") from None
