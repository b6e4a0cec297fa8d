"""A variant's manifest: where it comes from, how it was made, how good it was measured to be, checksums.

`quantize` writes it last, so a directory with a manifest is whole. `serving` and `gateway` only read it.
"""

import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from config.errors import ManifestError

FILE_NAME = "manifest.json"

Precision = str  # "bf16", "fp16", "fp32", "int8", "int4": the words that clients use
Engine = Literal["cpu", "cuda"]


class Record(BaseModel):
    """A frozen part of a file that knows all of its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(Record):
    """The unquantized model that a variant was made from."""

    name: str
    digest: str
    dtype: str


class Override(Record):
    """Modules that differ from their scheme; without bits they stay as the base has them.

    `modules` is a shell pattern (`*.down_proj`) on a module's full name; of several that match, the first counts.
    """

    modules: str
    bits: Literal[4, 8] | None = None
    group_size: int | None = None


class Scheme(Record):
    """What a variant's numbers look like; `overrides` are exceptions from bits and group size."""

    name: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    activation_bits: int
    format: Literal["gptq", "compressed-tensors"]
    overrides: tuple[Override, ...] = ()

    @property
    def precision(self) -> Precision:
        """The word a client uses for this scheme."""
        return f"int{self.bits}"


class Calibration(Record):
    """Which text the quantizer saw; `generated` of the samples the base wrote itself."""

    sha256: str
    samples: int
    tokens: int
    reasoning_tokens: int
    max_tokens: int
    seed: int
    generated: int = 0


class Quantizer(Record):
    """Which program made the variant, and how it went; `damp` counts modules by the damping they needed."""

    backend: str
    version: str
    seconds: float = 0.0
    settings: dict[str, str | float | bool] = Field(default_factory=dict)
    damp: dict[str, int] = Field(default_factory=dict)
    modules: int
    fallback_modules: tuple[str, ...] = ()


class Check(Record):
    """One limit that the variant was held against."""

    name: str
    value: float
    limit: float
    passed: bool


class Restricted(Record):
    """The same distance on a part of the tokens: those of reasoning, or those of answers."""

    tokens: int
    kl_mean: float
    top1_agreement: float
    perplexity_ratio: float


class Generation(Record):
    """Paired generations of parent and variant: `prompts` prompts, each with `seeds` seeds, up to `new_tokens` tokens.

    Rates are shares of all generations: `unfinished` never stopped, `repeating` ended in a run of repeated tokens,
    `unclosed` left a <think> open.
    """

    prompts: int
    seeds: int
    new_tokens: int
    length_ratio: float
    unfinished: float
    parent_unfinished: float
    repeating: float
    parent_repeating: float
    unclosed: float
    parent_unclosed: float


class Tasks(Record):
    """Questions with known answers, put to parent and variant alike.

    `recovery` is the variant's accuracy over the parent's; `flips` the share of items whose correctness changed.
    """

    dataset_sha256: str
    items: int
    parent_accuracy: float
    accuracy: float
    recovery: float
    flips: float


class Quality(Record):
    """Distance from the parent, measured teacher-forced on text that calibration never saw."""

    dataset_sha256: str
    tokens: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    perplexity_ratio: float
    length_ratio: float | None = None
    reasoning: Restricted | None = None
    answer: Restricted | None = None
    generation: Generation | None = None
    tasks: Tasks | None = None
    checks: tuple[Check, ...] = ()
    verdict: Literal["pass", "fail"]


class SealedFile(Record):
    """A file of the variant as it was when sealed."""

    sha256: str
    bytes: int


class Manifest(Record):
    """`manifest.json`, format 1; a variant that somebody else made, and that was adopted, has no `calibration`."""

    format: Literal[1] = 1
    id: str
    created: datetime
    base: Base
    scheme: Scheme
    calibration: Calibration | None = None
    quantizer: Quantizer
    quality: Quality
    files: dict[str, SealedFile] = Field(min_length=1)

    @property
    def bytes(self) -> int:
        """Size of the sealed files together."""
        return sum(file.bytes for file in self.files.values())

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the manifest of a variant directory; ManifestError says what is wrong with it."""
        path = directory / FILE_NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise ManifestError(f"{path}: no such file; a variant directory is made by `quantgate quantize`") from None
        except OSError as error:
            raise ManifestError(f"{path}: can't be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "top level"
            raise ManifestError(f"{path}: {where}: {first['msg']}") from error

    def to_json(self) -> str:
        """Render with stable key order, for files that are compared and hashed."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"

    def altered_files(self, directory: Path) -> list[str]:
        """Name the sealed files that are missing or changed since the seal; reads every byte."""
        return [name for name, sealed in self.files.items() if not _unchanged(directory / name, sealed)]


def _unchanged(path: Path, sealed: SealedFile) -> bool:
    return path.is_file() and path.stat().st_size == sealed.bytes and sha256_of(path) == sealed.sha256


def sha256_of(path: Path) -> str:
    """Digest one file without holding it in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
