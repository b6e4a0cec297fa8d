"""All that is known of a variant: its manifest, and what lies beside it about modules, evaluation and speed."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.manifest import Manifest
from quantize.errors import VariantError


@dataclass(frozen=True, slots=True)
class Dossier:
    """A variant's manifest and side files; `decode_tokens_per_second` is by machine, for one request at a time."""

    directory: Path
    manifest: Manifest
    modules: tuple[Mapping[str, Any], ...]
    evidence: Mapping[str, Any]
    decode_tokens_per_second: Mapping[str, float]


def read_dossier(directory: Path, manifest: Manifest) -> Dossier:
    """Read what lies beside a manifest; a side file that isn't there is empty, one that is broken a VariantError."""
    return Dossier(
        directory=directory,
        manifest=manifest,
        modules=tuple(_object(directory / "solved.json").get("modules", ())),
        evidence=_object(directory / "evaluation.json"),
        decode_tokens_per_second=dict(_speeds(_object(directory / "capacity.json"))),
    )


def _speeds(capacity: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """`{machine: {"decode_tokens_per_second": number, or {concurrency: number}}}` -> the speed of the least load."""
    for machine, told in capacity.items():
        speed = told.get("decode_tokens_per_second") if isinstance(told, dict) else None
        if isinstance(speed, dict) and speed:
            speed = speed[min(speed, key=lambda load: (len(load), load))]
        if isinstance(speed, int | float):
            yield machine, float(speed)


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise VariantError(f"{path}: not JSON ({error}); make or copy the variant again") from None
    return value if isinstance(value, dict) else {}
