"""Comparison of two variants: differing values of their manifests, and which is nearer to its parent."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

from config.manifest import Manifest
from config.measurements import Measurements
from config.paired_comparison import PairedComparison, compare_paired

Json = str | int | float | bool | None

_PARTS = ("base", "scheme", "calibration", "quantizer", "quality")
_HIGHER_IS_BETTER = frozenset({"top1_agreement", "accuracy", "recovery"})
_LOWER_IS_BETTER = frozenset(
    {"kl_mean", "kl_p99", "perplexity_ratio", "length_ratio", "unfinished", "repeating", "unclosed", "flips"},
)


@dataclass(frozen=True, slots=True)
class Difference:
    """A value that differs between two manifests; None if a manifest has no such value."""

    part: str
    key: str
    left: Json
    right: Json

    @property
    def delta(self) -> float | None:
        """The right number minus the left one; None unless both are numbers."""
        left, right = _number(self.left), _number(self.right)
        return None if left is None or right is None else right - left

    @property
    def better(self) -> Literal["left", "right"] | None:
        """The side with the better value, if the value is a quality metric."""
        metric = self.key.rpartition(".")[2]
        if self.part != "quality" or not self.delta or ".limit" in self.key:
            return None
        if metric in _HIGHER_IS_BETTER:
            return "right" if self.delta > 0 else "left"
        return ("left" if self.delta > 0 else "right") if metric in _LOWER_IS_BETTER else None


@dataclass(frozen=True, slots=True)
class FileDifference:
    """A file that differs or that one variant lacks (None): its size on each side."""

    name: str
    left_bytes: int | None
    right_bytes: int | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All differences of two variants; `same_files` have equal checksums."""

    left: Manifest
    right: Manifest
    differences: tuple[Difference, ...]
    files: tuple[FileDifference, ...]
    same_files: tuple[str, ...]
    paired: PairedComparison | None = None

    @property
    def comparable(self) -> bool:
        """Whether both were evaluated against the same parent on the same text."""
        left, right = self.left.quality, self.right.quality
        same_text = (left.dataset_sha256, left.tokens) == (right.dataset_sha256, right.tokens)
        return same_text and self.left.base.digest == self.right.base.digest


def compare(left: Manifest, right: Manifest, measured: tuple[Measurements, Measurements] | None = None) -> Comparison:
    """Compare two variants by their manifests, and if both were measured against one parent also chat by chat."""
    left_parts, right_parts = left.model_dump(mode="json"), right.model_dump(mode="json")
    differences = tuple(
        Difference(part, key, before, after)
        for part in _PARTS
        for key, before, after in _paired(_flat(left_parts[part]), _flat(right_parts[part]))
        if before != after
    )
    names = sorted(left.files.keys() | right.files.keys())
    pairs = [(name, left.files.get(name), right.files.get(name)) for name in names]
    return Comparison(
        left=left,
        right=right,
        differences=differences,
        files=tuple(
            FileDifference(name, left_file.bytes if left_file else None, right_file.bytes if right_file else None)
            for name, left_file, right_file in pairs
            if left_file != right_file
        ),
        same_files=tuple(name for name, left_file, right_file in pairs if left_file == right_file),
        paired=compare_paired(*measured) if measured and left.base.digest == right.base.digest else None,
    )


def comparison_text(comparison: Comparison) -> str:
    """Format a comparison as text, a value per line."""
    left, right = comparison.left, comparison.right
    lines = [f"left         {left.id}", f"right        {right.id}"]
    for part in _PARTS:
        differences = [difference for difference in comparison.differences if difference.part == part]
        if not differences:
            lines.append(f"{part:<12} the same")
        lines.extend(f"{part if first else '':<12} {_line(difference)}" for first, difference in _first(differences))
    if not comparison.comparable:
        lines.append(f"{'':<12} evaluated against different parents or on different text: metrics are not comparable")
    lines.extend(f"{'paired' if first else '':<12} {line}" for first, line in _first(paired_lines(comparison.paired)))
    lines.extend(f"{'files' if first else '':<12} {_file_line(file)}" for first, file in _first(comparison.files))
    if comparison.same_files:
        label = "" if comparison.files else "files"
        lines.append(f"{label:<12} the same: {', '.join(comparison.same_files)}")
    return "\n".join(lines)


def paired_lines(paired: PairedComparison | None) -> list[str]:
    """Format the differences on the same chats, one per line; nothing if there are no chats that both read."""
    if paired is None:
        return []
    lines = [f"{paired.chats} chats, {paired.tokens} generated tokens that both read; right minus left:"]
    for row in paired.differences:
        found, nearer = row.difference, "not shown which" if row.better == "not shown" else row.better
        lines.append(
            f"{row.figure}: {found.value:+.4g} (95 % interval {found.low:+.4g} to {found.high:+.4g}, "
            f"p {row.p_value:.2g}); nearer to the parent: {nearer}"
        )
    return lines


def comparison_json(comparison: Comparison) -> str:
    """Serialize a comparison as JSON."""
    value = {
        "left": comparison.left.id,
        "right": comparison.right.id,
        "comparable": comparison.comparable,
        "differences": [
            {
                "part": difference.part,
                "key": difference.key,
                "left": difference.left,
                "right": difference.right,
                "delta": difference.delta,
                "better": difference.better,
            }
            for difference in comparison.differences
        ],
        "paired": asdict(comparison.paired) if comparison.paired else None,
        "files": [
            {"name": file.name, "left_bytes": file.left_bytes, "right_bytes": file.right_bytes}
            for file in comparison.files
        ],
        "same_files": list(comparison.same_files),
    }
    return json.dumps(value, indent=2, ensure_ascii=False)


def _flat(value: object, key: str = "") -> dict[str, Json]:
    """Flatten a JSON value to dotted keys; the rows of a list are named by their `name` or `modules`."""
    if isinstance(value, dict):
        inner: dict[str, object] = value
    elif isinstance(value, list) and all(isinstance(row, dict) for row in value):
        inner = {str(row.get("name") or row.get("modules") or index): row for index, row in enumerate(value)}
    else:
        return {key: ", ".join(map(str, value)) if isinstance(value, list) else _plain(value)}
    flat: dict[str, Json] = {}
    for name, row in inner.items():
        flat |= _flat(row, f"{key}.{name}" if key else str(name))
    return {name: row for name, row in flat.items() if not name.endswith(".name")}


def _plain(value: object) -> Json:
    assert value is None or isinstance(value, str | int | float)
    return value


def _number(value: Json) -> float | None:
    return None if value is None or isinstance(value, str | bool) else float(value)


def _paired(left: Mapping[str, Json], right: Mapping[str, Json]) -> Iterator[tuple[str, Json, Json]]:
    for key in dict.fromkeys((*left, *right)):
        yield key, left.get(key), right.get(key)


_Row = TypeVar("_Row")


def _first(rows: Sequence[_Row]) -> Iterator[tuple[bool, _Row]]:
    """Mark the first row."""
    for position, row in enumerate(rows):
        yield position == 0, row


def _line(difference: Difference) -> str:
    line = f"{difference.key or difference.part}: {_value(difference.left)} -> {_value(difference.right)}"
    if difference.delta is None:
        return line
    verdict = {"left": ", worse", "right": ", better", None: ""}[difference.better]
    return f"{line} ({difference.delta:+.4g}{verdict})"


def _file_line(file: FileDifference) -> str:
    if file.left_bytes is None or file.right_bytes is None:
        return f"{file.name}: only {'right' if file.left_bytes is None else 'left'}"
    if file.left_bytes == file.right_bytes:
        return f"{file.name}: differs, {file.left_bytes} bytes in both"
    return f"{file.name}: {file.left_bytes} -> {file.right_bytes} bytes ({file.right_bytes - file.left_bytes:+d})"


def _value(value: Json) -> str:
    if value is None or value == "":
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
