"""A variant's manifest: provenance, quantization parameters, measured quality and checksums of its files.

`quantize` writes it last, so a directory with a manifest is complete. `serving` and `gateway` only read it.
"""

import hashlib
import json
import math
from datetime import datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from config.errors import ManifestError

FILE_NAME = "manifest.json"

Precision = str  # "bf16", "fp16", "fp32", "int8", "int4": the names in headers, labels and requests
Engine = Literal["cpu", "cuda"]
Verdict = Literal["pass", "fail", "not shown"]


class Record(BaseModel):
    """Base of all models in JSON files: frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(Record):
    """The parent: the unquantized model that a variant was made from."""

    name: str
    digest: str
    dtype: str


class Override(Record):
    """Exception from the scheme for some modules; with `bits` None they are not quantized.

    `modules` is a shell pattern (`*.down_proj`) matched against the full module name; the first matching override wins.
    """

    modules: str
    bits: Literal[4, 8] | None = None
    group_size: int | None = None


class Scheme(Record):
    """Number format of a variant's weights and activations; `overrides` are exceptions from bits and group size."""

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
        """Precision of the weights: "int4" or "int8"."""
        return f"int{self.bits}"


class Calibration(Record):
    """The calibration set; `generated` counts the samples whose completion the parent generated.

    `skipped_rows` of the files were invalid.
    """

    sha256: str
    samples: int
    tokens: int
    reasoning_tokens: int
    max_tokens: int
    seed: int
    generated: int = 0
    skipped_rows: int = 0


class ExpertCoverage(Record):
    """How many calibration tokens the quantized experts of a model saw.

    `undersampled` experts saw too few for GPTQ and were rounded to nearest (RTN).
    """

    experts: int
    fewest_tokens: int
    median_tokens: int
    undersampled: tuple[str, ...] = ()


class Quantizer(Record):
    """The quantization run; `damp` counts modules by the damping that they needed.

    `fallback_modules` were rounded to nearest (RTN) because GPTQ failed.
    """

    backend: str
    version: str
    seconds: float = 0.0
    settings: dict[str, str | float | bool] = Field(default_factory=dict)
    damp: dict[str, int] = Field(default_factory=dict)
    modules: int
    fallback_modules: tuple[str, ...] = ()
    experts: ExpertCoverage | None = None


class Interval(Record):
    """95 % interval of a figure; None where it has no end."""

    low: float | None
    high: float | None


class Check(Record):
    """One quality limit, and what the figure with its interval says about it.

    `passed` is true for the verdict "pass" alone. "not shown": the limit lies inside the interval; `more_chats` says
    how many more chats (prompts, questions) should decide it, None where no number would.
    """

    name: str
    value: float
    limit: float
    passed: bool
    interval: Interval | None = None
    verdict: Verdict = "pass"
    more_chats: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_verdict(cls, value: object) -> object:
        """Give a check without a verdict the one that `passed` says: manifests had no third verdict before."""
        if isinstance(value, dict) and "verdict" not in value and "passed" in value:
            return {**value, "verdict": "pass" if value["passed"] else "fail"}
        return value


class Restricted(Record):
    """Quality on a subset of the tokens: prompts, reasoning or answers."""

    tokens: int
    kl_mean: float
    top1_agreement: float
    perplexity_ratio: float


class Generation(Record):
    """Paired generations of parent and variant: `prompts` prompts with `seeds` seeds each, up to `new_tokens` tokens.

    Rates are fractions of all generations: `unfinished` reached `new_tokens`, `repeating` ended in repeated tokens,
    `unclosed` left a <think> open. `length_ratio` is the variant's length over the parent's.
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
    """Accuracy of parent and variant on questions with known answers.

    `recovery` is the variant's accuracy divided by the parent's; `flips` the fraction of items whose correctness
    differs.
    """

    dataset_sha256: str
    items: int
    parent_accuracy: float
    accuracy: float
    recovery: float
    flips: float


class Quality(Record):
    """Quality relative to the parent, measured with teacher forcing on held-out text.

    `tokens` are the generated ones of `chats` samples (0: unknown), reasoning and answers; those of their `prompt` are
    reported beside them. `intervals` are by figure. `longest_position` is the last position that was compared.
    `kl_floor` is the mean divergence of the parent from itself, read in another way by the same engine. `method` names
    what computed the probabilities; with `top_k`, all but the likeliest tokens were lumped.
    """

    dataset_sha256: str
    tokens: int
    chats: int = 0
    method: str = ""
    top_k: int | None = None
    longest_position: int | None = None
    kl_floor: float | None = None
    intervals: dict[str, Interval] = Field(default_factory=dict)
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    perplexity_ratio: float
    length_ratio: float | None = None
    prompt: Restricted | None = None
    reasoning: Restricted | None = None
    answer: Restricted | None = None
    generation: Generation | None = None
    tasks: Tasks | None = None
    checks: tuple[Check, ...] = ()
    verdict: Verdict

    def bound(self, figure: str, *, upper: bool) -> float | None:
        """Return the upper or lower end of a figure's interval, or the figure itself if it has no interval.

        None for a figure that was not measured; infinite where the interval has no end.
        """
        value: float | None = getattr(self, figure)
        interval = self.intervals.get(figure)
        if value is None or interval is None:
            return value
        end = interval.high if upper else interval.low
        return end if end is not None else (math.inf if upper else -math.inf)


class SealedFile(Record):
    """Checksum and size of a file of the variant."""

    sha256: str
    bytes: int


class Manifest(Record):
    """`manifest.json`, format 1; `calibration` is None for an adopted variant, which another tool quantized."""

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
        """Total size of the files."""
        return sum(file.bytes for file in self.files.values())

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the manifest of a variant directory; ManifestError if it is missing, unreadable or invalid."""
        path = directory / FILE_NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise ManifestError(f"{path}: no such file; `quantgate quantize` creates a variant directory") from None
        except OSError as error:
            raise ManifestError(f"{path}: can't be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "top level"
            raise ManifestError(f"{path}: {where}: {first['msg']}") from error

    def to_json(self) -> str:
        """Serialize with a stable key order: the file is hashed and compared."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"

    def altered_files(self, directory: Path) -> list[str]:
        """Return the names of files that are missing or that do not match their checksum; reads every byte."""
        return [name for name, file in self.files.items() if not _unchanged(directory / name, file)]


def _unchanged(path: Path, recorded: SealedFile) -> bool:
    return path.is_file() and path.stat().st_size == recorded.bytes and sha256_of(path) == recorded.sha256


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hex, reading it in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
