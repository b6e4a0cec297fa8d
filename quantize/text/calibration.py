"""Calibration text: JSONL files with weights, split by content, drawn by seed. No tokenizer here."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path

from config.manifest import sha256_of
from quantize.errors import CalibrationError
from quantize.text.rows import Row, parse_line

# A Hessian from fewer chats than this follows their quirks.
FEWEST_SAMPLES = 16
FEWEST_HELD_OUT = 4
_PROBLEMS_SHOWN = 10
_DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True, slots=True)
class Source:
    """A calibration file, its digest, and its weight: how many samples it gives, against the other files.

    `repeated_rows` of its `rows` say what an earlier row says. A file of weight 0 is used for the evaluation alone.
    """

    path: Path
    sha256: str
    weight: float = 1.0
    rows: int = 0
    repeated_rows: int = 0


@dataclass(frozen=True, slots=True)
class Draw:
    """The rows to calibrate on, and those to evaluate on, which calibration never sees; both in order of use.

    `repeated_rows` of the `read_rows` in the files said what others say, and were left out.
    """

    calibration: tuple[Row, ...]
    held_out: tuple[Row, ...]
    read_rows: int = 0
    repeated_rows: int = 0


def shipped_files() -> list[Path]:
    """List the calibration files that come with this package."""
    return sorted(_DATA.glob("*.jsonl"))


def read_sources(paths: Sequence[Path], weights: Sequence[float] = ()) -> tuple[tuple[Source, ...], tuple[Row, ...]]:
    """Read JSONL files and their different rows; CalibrationError lists up to ten broken lines.

    `weights` are those of `paths`, one each, or none at all where every file weighs the same.
    """
    weighed = list(zip(paths, weights or [1.0] * len(paths), strict=True))
    _require([f"{path}: no such calibration file" for path in paths if not path.is_file()])
    _require(_weight_problems(weighed))
    sources: list[Source] = []
    rows: list[Row] = []
    problems: list[str] = []
    for path, weight in weighed:
        parsed, sha256 = list(_parse_file(path)), sha256_of(path)
        problems += islice((item for item in parsed if isinstance(item, str)), _PROBLEMS_SHOWN)
        read = [replace(item, source=sha256) for item in parsed if isinstance(item, Row)]
        rows += read
        repeated = len(read) - len({row.sha256 for row in read})
        sources.append(Source(path, sha256, float(weight), len(read), repeated))
    _require(problems[:_PROBLEMS_SHOWN])
    return tuple(sources), _different(rows, _weights(sources))


def draw(rows: Iterable[Row], *, samples: int, seed: int, sources: Sequence[Source] = ()) -> Draw:
    """Split rows by content, take samples from the files by weight, and put both sides in the seed's order.

    A file that has too few rows gives all, and the others fill up. CalibrationError where too few remain.
    """
    ordered = sorted(rows, key=lambda row: _shuffled(row, seed))
    weights = _weights(sources)
    held_out = tuple(row for row in ordered if is_held_out(row))
    usable = [row for row in ordered if not is_held_out(row) and weights.get(row.source, 1.0) > 0]
    if len(usable) < FEWEST_SAMPLES or len(held_out) < FEWEST_HELD_OUT:
        raise CalibrationError([_too_few(len(ordered), len(usable), len(held_out))])
    left = dict(shares(samples, Counter(row.source for row in usable), weights))
    taken = tuple(row for row in usable if _takes(left, row.source))
    read_rows = sum(source.rows for source in sources)
    return Draw(taken, held_out, read_rows, max(read_rows - len(ordered), 0))


def shares(wanted: int, available: Mapping[str, int], weights: Mapping[str, float]) -> Mapping[str, int]:
    """How many of `wanted` each file gives: by weight, never more than it has; what is missing the others give.

    The result depends on names, counts and weights alone; fractions go to the largest remainders.
    """
    given = dict.fromkeys(available, 0)
    exact = {name: Fraction(weights.get(name, 1.0)) for name in available}
    waiting = sorted(name for name in available if exact[name] > 0)
    while waiting and wanted:
        total = sum(exact[name] for name in waiting)
        ideal = {name: wanted * exact[name] / total for name in waiting}
        full = [name for name in waiting if available[name] <= ideal[name]]
        if not full:
            return given | _rounded(ideal, wanted)
        given |= {name: available[name] for name in full}
        wanted -= sum(available[name] for name in full)
        waiting = [name for name in waiting if name not in full]
    return given


def is_held_out(row: Row) -> bool:
    """Keep about a third of all contents out of calibration, by content and so for every seed and file alike.

    What the base itself answered to a row's prompt goes where that row goes: it must not bring a prompt of the
    evaluation into calibration.
    """
    return int((row.origin or row.sha256)[:8], 16) % 3 == 0


def contents_digest(rows: Iterable[str]) -> str:
    """Digest the sha256 sums of rows, in their order of use."""
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _parse_file(path: Path) -> Iterator[Row | str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                yield f"{where}: not UTF-8: {error.reason} at byte {error.start}"
                continue
            if text.strip():
                yield parse_line(text, where)


def _different(rows: Sequence[Row], weights: Mapping[str, float]) -> tuple[Row, ...]:
    """Keep one row of each content: the one in the heaviest file, whichever file was named first."""
    kept: dict[str, Row] = {}
    for row in rows:
        rival = kept.setdefault(row.sha256, row)
        if (weights[row.source], row.source) > (weights[rival.source], rival.source):
            kept[row.sha256] = row
    return tuple(kept.values())


def _weights(sources: Sequence[Source]) -> dict[str, float]:
    """Weights by content: a file that is given twice weighs twice."""
    weights: dict[str, float] = {}
    for source in sources:
        weights[source.sha256] = weights.get(source.sha256, 0.0) + source.weight
    return weights


def _rounded(ideal: Mapping[str, Fraction], wanted: int) -> dict[str, int]:
    given = {name: math.floor(share) for name, share in ideal.items()}
    by_remainder = sorted(ideal, key=lambda name: (given[name] - ideal[name], name))
    for name in by_remainder[: wanted - sum(given.values())]:
        given[name] += 1
    return given


def _takes(left: dict[str, int], source: str) -> bool:
    left[source] -= 1
    return left[source] >= 0


def _weight_problems(weighed: Sequence[tuple[Path, float]]) -> list[str]:
    wrong = [
        f"{path}: weight {weight:g} is no number from 0 up" for path, weight in weighed if not 0 <= weight < math.inf
    ]
    if not wrong and weighed and not any(weight for _, weight in weighed):
        return ["all calibration files have weight 0; give one of them more"]
    return wrong


def _too_few(rows: int, usable: int, held_out: int) -> str:
    return (
        f"too few calibration rows: {rows} different chats give {usable} to calibrate on and {held_out} to evaluate "
        f"on, at least {FEWEST_SAMPLES} and {FEWEST_HELD_OUT} are needed; pass more text with --data"
    )


def _require(problems: Sequence[str]) -> None:
    if problems:
        raise CalibrationError(list(problems))


def _shuffled(row: Row, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{row.sha256}".encode()).hexdigest()
