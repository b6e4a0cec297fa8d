"""Two manifests side by side: what differs between two variants, and which of them is better where."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from config.manifest import Manifest

_PARTS = ("base", "scheme", "calibration", "quantizer", "quality")
_HIGHER_IS_BETTER = frozenset({"top1_agreement", "accuracy", "recovery"})
_LOWER_IS_BETTER = frozenset(
    {"kl_mean", "kl_p99", "perplexity_ratio", "length_ratio", "unfinished", "repeating", "unclosed", "flips"},
)


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that two manifests don't share; None where one of them has none."""

    part: str
    key: str
    left: Any
    right: Any

    @property
    def delta(self) -> float | None:
        """The right number less the left one."""
        both = (self.left, self.right)
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in both):
            return None
        return float(self.right) - float(self.left)

    @property
    def better(self) -> Literal["left", "right"] | None:
        """Which side's measured figure is better, where it is one."""
        figure = self.key.rpartition(".")[2]
        if self.part != "quality" or not self.delta or ".limit" in self.key:
            return None
        if figure in _HIGHER_IS_BETTER:
            return "right" if self.delta > 0 else "left"
        return ("left" if self.delta > 0 else "right") if figure in _LOWER_IS_BETTER else None


@dataclass(frozen=True, slots=True)
class FileDifference:
    """A file that only one variant has, or that differs: its size in bytes on each side."""

    name: str
    left_bytes: int | None
    right_bytes: int | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that differs; `same_files` are equal byte for byte.

    Figures are comparable where parent and held-out text are the same.
    """

    left: Manifest
    right: Manifest
    differences: tuple[Difference, ...]
    files: tuple[FileDifference, ...]
    same_files: tuple[str, ...]

    @property
    def comparable(self) -> bool:
        """Whether both were measured against the same parent on the same text."""
        ours, theirs = self.left.quality, self.right.quality
        same_text = (ours.dataset_sha256, ours.tokens) == (theirs.dataset_sha256, theirs.tokens)
        return same_text and self.left.base.digest == self.right.base.digest


def compare(left: Manifest, right: Manifest) -> Comparison:
    """Compare two variants by their manifests alone."""
    ours, theirs = left.model_dump(mode="json"), right.model_dump(mode="json")
    differences = tuple(
        Difference(part, key, before, after)
        for part in _PARTS
        for key, before, after in _paired(_flat(ours[part]), _flat(theirs[part]))
        if before != after
    )
    names = sorted(left.files.keys() | right.files.keys())
    pairs = [(name, left.files.get(name), right.files.get(name)) for name in names]
    return Comparison(
        left=left,
        right=right,
        differences=differences,
        files=tuple(
            FileDifference(name, ours.bytes if ours else None, theirs.bytes if theirs else None)
            for name, ours, theirs in pairs
            if ours != theirs
        ),
        same_files=tuple(name for name, ours, theirs in pairs if ours == theirs),
    )


def comparison_text(comparison: Comparison) -> str:
    """Tell a comparison for people, a value a line."""
    left, right = comparison.left, comparison.right
    lines = [f"left         {left.id}", f"right        {right.id}"]
    for part in _PARTS:
        found = [difference for difference in comparison.differences if difference.part == part]
        if not found:
            lines.append(f"{part:<12} the same")
        lines.extend(f"{part if first else '':<12} {_line(one)}" for first, one in _first(found))
    if not comparison.comparable:
        lines.append(f"{'':<12} measured against other parents or on other text: better and worse mean little")
    lines.extend(f"{'files' if first else '':<12} {_file_line(one)}" for first, one in _first(list(comparison.files)))
    if comparison.same_files:
        label = "" if comparison.files else "files"
        lines.append(f"{label:<12} the same: {', '.join(comparison.same_files)}")
    return "\n".join(lines)


def comparison_json(comparison: Comparison) -> str:
    """Tell a comparison for programs."""
    value = {
        "left": comparison.left.id,
        "right": comparison.right.id,
        "comparable": comparison.comparable,
        "differences": [
            {
                "part": one.part,
                "key": one.key,
                "left": one.left,
                "right": one.right,
                "delta": one.delta,
                "better": one.better,
            }
            for one in comparison.differences
        ],
        "files": [
            {"name": one.name, "left_bytes": one.left_bytes, "right_bytes": one.right_bytes} for one in comparison.files
        ],
        "same_files": list(comparison.same_files),
    }
    return json.dumps(value, indent=2, ensure_ascii=False)


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Map dotted keys to plain values; rows that have a name go by it."""
    if isinstance(value, dict):
        inner: Mapping[str, Any] = value
    elif isinstance(value, list) and all(isinstance(row, dict) for row in value):
        inner = {str(row.get("name") or row.get("modules") or index): row for index, row in enumerate(value)}
    else:
        return {key: ", ".join(map(str, value)) if isinstance(value, list) else value}
    flat: dict[str, Any] = {}
    for name, row in inner.items():
        flat |= _flat(row, f"{key}.{name}" if key else str(name))
    return {name: row for name, row in flat.items() if not name.endswith(".name")}


def _paired(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys((*left, *right)):
        yield key, left.get(key), right.get(key)


def _first(rows: list[Any]) -> Iterator[tuple[bool, Any]]:
    for position, row in enumerate(rows):
        yield position == 0, row


def _line(one: Difference) -> str:
    line = f"{one.key or one.part}: {_value(one.left)} -> {_value(one.right)}"
    if one.delta is None:
        return line
    verdict = {"left": ", worse", "right": ", better", None: ""}[one.better]
    return f"{line} ({one.delta:+.4g}{verdict})"


def _file_line(one: FileDifference) -> str:
    if one.left_bytes is None or one.right_bytes is None:
        return f"{one.name}: only {'right' if one.left_bytes is None else 'left'}"
    if one.left_bytes == one.right_bytes:
        return f"{one.name}: differs, {one.left_bytes} bytes in both"
    return f"{one.name}: {one.left_bytes} -> {one.right_bytes} bytes ({one.right_bytes - one.left_bytes:+d})"


def _value(value: Any) -> str:
    if value is None or value == "":
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
