"""All that is known of a variant: its manifest, and what lies beside it about modules, evaluation and speed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.capacity import FILE_NAME as CAPACITY_FILE
from config.capacity import Capacity, read_capacity
from config.manifest import Manifest
from quantize.errors import VariantError
from quantize.variants.quant_log import quant_log_file


@dataclass(frozen=True, slots=True)
class VariantRecord:
    """A variant's manifest and side files; `capacity` is what was measured of its speed."""

    directory: Path
    manifest: Manifest
    modules: tuple[Mapping[str, Any], ...]
    evidence: Mapping[str, Any]
    capacity: Capacity

    @property
    def speeds(self) -> dict[str, float]:
        """Tokens a second of one request at the least load, by machine."""
        measured = self.capacity.by_machine()
        return {machine: one.loads[0].decode_tokens_per_second for machine, one in measured.items()}


def read_variant_record(directory: Path, manifest: Manifest) -> VariantRecord:
    """Read what lies beside a manifest; a side file that isn't there is empty, one that is broken an error."""
    return VariantRecord(
        directory=directory,
        manifest=manifest,
        modules=tuple(_object(quant_log_file(directory)).get("modules", ())),
        evidence=_object(directory / "evaluation.json"),
        capacity=read_capacity(directory / CAPACITY_FILE),
    )


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise VariantError(f"{path}: not JSON ({error}); make or copy the variant again") from None
    return value if isinstance(value, dict) else {}
