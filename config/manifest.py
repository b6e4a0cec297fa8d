"""A variant's manifest: provenance, quantization parameters, measured quality and checksums of its files.

`quantize` writes it last, so a directory with a manifest is complete. `serving` and `gateway` only read it.
"""

import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, computed_field, model_validator

from config.errors import ManifestError
from config.quality import Quality
from config.quantization import (
    COMPRESSED_TENSORS,
    REORDERING,
    UNQUANTIZED_BITS,
    Compression,
    QuantizationArgs,
    grouped,
)
from config.record import Record
from config.vllm import Engine as Engine  # noqa: PLC0414 - re-exported

FILE_NAME = "manifest.json"

Precision = str  # "bf16", "fp16", "fp32", "fp8", "int8", "int4", "fp4": the names in headers, labels and requests


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
    """Number format of a variant, in the words of compressed-tensors; `overrides` are exceptions for some modules.

    `compression` is how weights are stored; `targets` and `ignore` name classes and modules as compressed-tensors does.
    Manifests also have the keys of format 1 as it was published (`bits`, `group_size`, `sym`, `desc_act`,
    `activation_bits`, `format`); they are derived from the others when written, and read where the others are missing.
    """

    name: str
    compression: Compression
    weights: QuantizationArgs
    input_activations: QuantizationArgs | None = None
    kv_cache: QuantizationArgs | None = None
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: tuple[Override, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _read_first_keys(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not _FIRST_KEYS & value.keys():
            return value
        rest = {key: value[key] for key in value.keys() - _FIRST_KEYS}
        return rest if "weights" in rest else _from_first_keys(value) | rest

    @computed_field  # type: ignore[prop-decorator]
    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return self.weights.num_bits

    @computed_field  # type: ignore[prop-decorator]
    @property
    def group_size(self) -> int:
        """Inputs that share a scale; -1: all of them."""
        return self.weights.columns

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sym(self) -> bool:
        """Whether there are no zero points."""
        return self.weights.symmetric

    @computed_field  # type: ignore[prop-decorator]
    @property
    def desc_act(self) -> bool:
        """Whether inputs are grouped in the order of their activations."""
        return self.weights.actorder in REORDERING

    @computed_field  # type: ignore[prop-decorator]
    @property
    def activation_bits(self) -> int:
        """Bits of an activation; 16: not quantized."""
        return self.input_activations.num_bits if self.input_activations else UNQUANTIZED_BITS

    @computed_field  # type: ignore[prop-decorator]
    @property
    def format(self) -> str:
        """The quantization method of config.json: gptq, compressed-tensors, awq, fp8, ..."""
        return "compressed-tensors" if self.compression in COMPRESSED_TENSORS else self.compression

    @property
    def precision(self) -> Precision:
        """Precision of the weights: "int4", "int8", "fp8" or "fp4"."""
        return self.weights.precision

    def with_weights(self, **changes: object) -> Self:
        """Return the scheme with other arguments for its weights."""
        return self.model_copy(update={"weights": self.weights.model_copy(update=changes)})

    def identity(self) -> dict[str, object]:
        """Return what a digest of the scheme covers.

        The first keys alone where they say everything, so that recipes keep their digests.
        """
        first = self.model_dump(mode="json", include=set(_FIRST_KEYS | {"name", "overrides"}))
        if first["format"] in _FIRST_FORMATS and Scheme.model_validate(first) == self:
            return first
        return self.model_dump(mode="json")


_FIRST_KEYS = frozenset({"bits", "group_size", "sym", "desc_act", "activation_bits", "format"})
_FIRST_FORMATS = frozenset({"gptq", "compressed-tensors"})


def _from_first_keys(value: dict[str, Any]) -> dict[str, Any]:
    """Translate the keys of manifests that have no other ones."""
    activation_bits = value.get("activation_bits", UNQUANTIZED_BITS)
    weights = grouped(
        value["bits"],
        value["group_size"],
        symmetric=value.get("sym", True),
        actorder="group" if value.get("desc_act") else None,
    )
    integers = "int-quantized" if activation_bits < UNQUANTIZED_BITS else "pack-quantized"
    tokens = QuantizationArgs(num_bits=activation_bits, strategy="token", dynamic=True)
    return {
        "compression": integers if value.get("format") == "compressed-tensors" else value.get("format"),
        "weights": weights,
        "input_activations": tokens if activation_bits < UNQUANTIZED_BITS else None,
    }


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
