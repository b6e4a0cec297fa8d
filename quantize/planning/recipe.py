"""A recipe: everything that decides a variant's bytes, and the digest that names it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib import metadata

from config.manifest import Override, Scheme
from quantize.base import BaseModel, slug
from quantize.calibration.datasets import Dataset
from quantize.calibration.formats import NATIVE
from quantize.errors import RecipeError
from quantize.planning.transforms import TransformName
from quantize.schemes.makers import RTN_FP8, RTN_FP8_VERSION, is_data_free
from quantize.schemes.settings import SolverSettings

# Raise this when the same recipe would give other bytes because this package has changed.
_REVISION = 4
# The last release before the project was archived.
_AUTO_GPTQ_VERSION = "0.7.1"
# Chats that a search measures on: of those that could calibrate, some that the solver doesn't read.
SEARCH_CHATS = 36
# Raise this when a search with the same budget finds otherwise.
_SEARCH_REVISION = 2


@dataclass(frozen=True, slots=True)
class Backend:
    """The program that solves for the integers."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Devices:
    """Which GPUs may work, and how much of each one's memory; they decide the time a variant takes, not its bytes."""

    gpus: tuple[int, ...] = ()
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """`scheme: auto`: choose bits and group size per module, within one limit of the two.

    `max_bytes` limits the variant's tensors, `max_kl` its mean divergence; the other one is made as good as it
    gets. `overrides` are modules whose numbers are not the search's to choose. With `zero_points` (`auto-asym`) 4 bits
    have them, and the variant is stored as compressed-tensors.
    """

    max_bytes: int | None = None
    max_kl: float | None = None
    overrides: tuple[Override, ...] = ()
    zero_points: bool = False

    @property
    def most_solves(self) -> int:
        """How often a search solves the model at most.

        For `max_bytes` four solutions without GPTAQ, then the result and the start as wholes; for `max_kl` the start as
        a whole, two solutions without GPTAQ, then three results as wholes.
        """
        return 6


@dataclass(frozen=True, slots=True)
class Recipe:
    """Base, scheme, calibration text and settings; equal digests mean equal variants.

    With a `budget` the scheme is the smallest one that fits, where the search for a better one starts: whoever
    replaces it by what the search found keeps the recipe's digest, and so the variant's name. `split_by_prompt` says
    that rows share prompts and so were split otherwise than by their own contents.
    """

    base: BaseModel
    scheme: Scheme
    datasets: tuple[Dataset, ...]
    samples: int
    max_tokens: int
    seed: int
    settings: SolverSettings
    backend: Backend
    devices: Devices = Devices()
    budget: Budget | None = None
    split_by_prompt: bool = False
    transforms: tuple[TransformName, ...] = ()

    def digest(self) -> str:
        """Digest contents, never paths, so that every machine gives a recipe the same name."""
        if is_data_free(self.scheme) and self.budget is None and self.scheme.kv_cache is None:
            return self._data_free_digest()
        payload = {
            "revision": _REVISION,
            "base": self.base.digest,
            "scheme": self.scheme.identity() if self.budget is None else _budget_identity(self.budget),
            "calibration": sorted((dataset.sha256, dataset.weight) for dataset in self.datasets),
            "samples": self.samples,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "settings": asdict(self.settings),
            "backend": [self.backend.name, self.backend.version],
            **self._reading(),
            **({"transforms": list(self.transforms)} if self.transforms else {}),
        }
        return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()

    def _data_free_digest(self) -> str:
        payload = {
            "base": self.base.digest,
            "scheme": self.scheme.identity(),
            "backend": [self.backend.name, self.backend.version],
        }
        return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()

    def _reading(self) -> dict[str, object]:
        """Return how the text is read, where revision 3 began otherwise; all other recipes keep their names."""
        formats = sorted({name for dataset in self.datasets for name, _ in dataset.formats} - NATIVE)
        return {
            **({"formats": formats} if formats else {}),
            **({"split": "prompt"} if self.split_by_prompt else {}),
        }

    @property
    def variant_id(self) -> str:
        """Name the variant: what it comes from, its precision, and 8 digits of the recipe's digest."""
        return f"{slug(self.base.name)}-{self.scheme.precision}-{self.digest()[:8]}"


def _budget_identity(budget: Budget) -> dict[str, object]:
    kept = [override.model_dump(mode="json") for override in budget.overrides]
    zero_points = {"zero_points": True} if budget.zero_points else {}
    limits = {"max_bytes": budget.max_bytes, "max_kl": budget.max_kl}
    return {"search": _SEARCH_REVISION, **limits, "overrides": kept, **zero_points}


def chosen_backend(name: str) -> Backend:
    """Give the backend of a name its version: AutoGPTQ's last one, which has an environment of its own, or ours."""
    if name == RTN_FP8:
        return Backend(name, RTN_FP8_VERSION)
    return Backend(name, _AUTO_GPTQ_VERSION) if name == "auto-gptq" else installed_backend(name)


def installed_backend(distribution: str = "gptqmodel") -> Backend:
    """Find the backend's version without importing it (an import takes 15 s)."""
    try:
        return Backend(distribution, metadata.version(distribution))
    except metadata.PackageNotFoundError:
        raise RecipeError(f"{distribution} is not installed; pip install 'quantgate[quantize]'") from None
