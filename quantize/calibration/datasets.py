"""Calibration text: files with weights, split by prompt, drawn by seed. No tokenizer here."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

from config.manifest import sha256_of
from quantize.calibration.containers import read_records
from quantize.calibration.formats import ONLY_TEXT
from quantize.calibration.parsing import parse_value
from quantize.calibration.records import Message, Record, prompt_of
from quantize.errors import CalibrationError

# A Hessian from fewer chats than this follows their quirks.
FEWEST_SAMPLES = 16
FEWEST_HELD_OUT = 4
# Share of a file's rows that may be invalid: they are skipped.
MAX_BAD = 0.01
_PROBLEMS_SHOWN = 10
_SAME_PROBLEM = 3
_OF_THE_FILE = MappingProxyType(
    {": not UTF-8: ": "; save it as UTF-8, e.g. by iconv -f latin1 -t utf-8", ONLY_TEXT: ""},
)
_DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True, slots=True)
class Dataset:
    """A calibration file, its digest, and its weight: how many samples it gives, against the other files.

    `repeated_rows` of its `rows` say what an earlier row says; `skipped` are the problems of those that were invalid.
    `kind` is that of the file, `formats` counts its rows by their format, commonest first. A file of weight 0 is used
    for the evaluation alone.
    """

    path: Path
    sha256: str
    weight: float = 1.0
    rows: int = 0
    repeated_rows: int = 0
    kind: str = "JSON lines"
    formats: tuple[tuple[str, int], ...] = ()
    skipped: tuple[str, ...] = ()

    def summary(self) -> list[str]:
        """Describe in lines what was found in the file, and what was skipped."""
        counts = [f"{name} ({count})" if len(self.formats) > 1 else name for name, count in self.formats]
        lines = [f"{self.path}: {self.rows} rows, {self.kind}, format: {', '.join(counts)}"]
        if self.skipped:
            every = self.rows + len(self.skipped)
            lines.append(f"{self.path}: invalid rows skipped: {len(self.skipped)} of {every}: {self.skipped[0]}")
        return lines


@dataclass(frozen=True, slots=True)
class CalibrationSplit:
    """The rows to calibrate on, and those to evaluate on, which calibration never sees; both in order of use.

    `repeated_rows` of the `read_rows` in the files said what others say, and were left out. `moved_rows` lie on the
    side of their prompt, and not on that of their own content. `max_bad` is the share of the rows that a chat template
    may refuse. `spare` are rows that could calibrate and were not drawn: a search measures on them.
    """

    calibration: tuple[Record, ...]
    held_out: tuple[Record, ...]
    read_rows: int = 0
    repeated_rows: int = 0
    moved_rows: int = 0
    max_bad: float = MAX_BAD
    spare: tuple[Record, ...] = ()


def shipped_files() -> list[Path]:
    """List the calibration files that come with this package."""
    return sorted(_DATA.glob("*.jsonl"))


def read_datasets(
    paths: Sequence[Path], weights: Sequence[float] = (), max_bad: float = MAX_BAD
) -> tuple[tuple[Dataset, ...], tuple[Record, ...]]:
    """Read files and their different rows; CalibrationError lists up to ten problems.

    `weights` are those of `paths`, one each, or none at all where every file weighs the same. Invalid rows are skipped
    if they are at most `max_bad` of the rows of their file.
    """
    weighed = list(zip(paths, weights or [1.0] * len(paths), strict=True))
    _require([f"{path}: no such calibration file" for path in paths if not path.exists()])
    _require(_weight_problems(weighed))
    datasets: list[Dataset] = []
    records: list[Record] = []
    problems: list[str] = []
    for path, weight in weighed:
        dataset, read = _read_dataset(path, weight)
        if len(dataset.skipped) > max_bad * (dataset.rows + len(dataset.skipped)):
            problems += _shortened(dataset)
        datasets.append(dataset)
        records += read
    _require(problems[:_PROBLEMS_SHOWN])
    return tuple(datasets), with_split_keys(_different(records, _weights(datasets)))


def split_records(
    records: Iterable[Record], *, samples: int, seed: int, datasets: Sequence[Dataset] = (), spare: int = 0
) -> CalibrationSplit:
    """Split rows by prompt, take samples from the files by weight, and put both sides in the seed's order.

    A file that has too few rows gives all, and the others fill up. Of the rows that are left over, up to `spare` with
    other prompts are given, too. CalibrationError where too few remain.
    """
    ordered = sorted(with_split_keys(records), key=lambda record: _shuffled(record, seed))
    weights = _weights(datasets)
    held_out = tuple(record for record in ordered if is_held_out(record))
    usable = [record for record in ordered if not is_held_out(record) and weights.get(record.source, 1.0) > 0]
    if len(usable) < FEWEST_SAMPLES or len(held_out) < FEWEST_HELD_OUT:
        raise CalibrationError([_too_few(ordered, len(usable), len(held_out))])
    left = dict(shares(samples, Counter(record.source for record in usable), weights))
    taken = tuple(record for record in usable if _takes(left, record.source))
    read_rows = sum(dataset.rows for dataset in datasets)
    return CalibrationSplit(
        taken,
        held_out,
        read_rows,
        repeated_rows=max(read_rows - len(ordered), 0),
        moved_rows=sum(is_held_out(record) != is_held_out(replace(record, split_key="")) for record in ordered),
        spare=_other_prompts(usable, taken)[:spare] if spare else (),
    )


def _other_prompts(records: Iterable[Record], taken: Sequence[Record]) -> tuple[Record, ...]:
    """Keep the records that share neither content nor prompt with those that were taken; bare text has no prompt."""
    contents, prompts = {record.sha256 for record in taken}, {prompt_of(record) for record in taken} - {()}
    return tuple(record for record in records if record.sha256 not in contents and prompt_of(record) not in prompts)


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


def with_split_keys(records: Iterable[Record]) -> tuple[Record, ...]:
    """Give rows with the same prompt the same split key, so that no prompt both calibrates and judges.

    The key is the smallest content digest among the rows with that prompt that the base did not answer itself, or
    else the smallest of their origins. So a prompt that occurs once is split by its row's own content, and the order
    of rows and files has no say. It takes all rows at once: without a file that shares a prompt, the prompt's key may
    be another one. The prompt is all up to the last user turn.
    """
    listed = list(records)
    keys: dict[tuple[Message, ...], tuple[bool, str]] = {}
    for record in listed:
        prompt = prompt_of(record)
        if prompt:
            own = (record.generated, record.origin or record.sha256)
            keys[prompt] = min(keys.get(prompt, own), own)
    alone = (False, "")
    return tuple(replace(record, split_key=keys.get(prompt_of(record), alone)[1]) for record in listed)


def is_held_out(record: Record) -> bool:
    """Keep about a third of all prompts out of calibration, by content and so for every seed.

    What the base itself answered to a row's prompt goes where that row goes: it must not bring a prompt of the
    evaluation into calibration.
    """
    return int((record.split_key or record.origin or record.sha256)[:8], 16) % 3 == 0


def contents_digest(records: Iterable[str]) -> str:
    """Digest the sha256 sums of rows, in their order of use."""
    return hashlib.sha256("\n".join(records).encode()).hexdigest()


def _read_dataset(path: Path, weight: float) -> tuple[Dataset, list[Record]]:
    kind, raw_records = read_records(path)
    parsed = [
        f"{raw.where}: {raw.problem}" if raw.problem else parse_value(raw.value, raw.where) for raw in raw_records
    ]
    sha256 = sha256_of(path)
    records = [replace(item, source=sha256) for item in parsed if isinstance(item, Record)]
    skipped = tuple(item for item in parsed if isinstance(item, str))
    if not parsed:
        raise CalibrationError([f"{path}: holds no rows"])
    formats = Counter(f"{record.format} with tools" if record.uses_tools else record.format for record in records)
    return Dataset(
        path,
        sha256,
        float(weight),
        rows=len(records),
        repeated_rows=len(records) - len({record.sha256 for record in records}),
        kind=kind,
        formats=tuple(sorted(formats.items(), key=lambda item: (-item[1], item[0]))),
        skipped=skipped,
    ), records


def _shortened(dataset: Dataset) -> list[str]:
    """List a file's problems; what is wrong with the file as a whole is one of them."""
    problems = list(dataset.skipped)
    for mark, advice in _OF_THE_FILE.items():
        alike = [problem for problem in problems if mark in problem]
        if len(alike) >= _SAME_PROBLEM:
            summary = f"{alike[0]} ({len(alike)} rows of this file){advice}"
            problems = [summary, *(problem for problem in problems if problem not in alike)]
    return problems


def _different(records: Sequence[Record], weights: Mapping[str, float]) -> tuple[Record, ...]:
    """Keep one row of each content: the one in the heaviest file, whichever file was named first."""
    kept: dict[str, Record] = {}
    for record in records:
        rival = kept.setdefault(record.sha256, record)
        if (weights[record.source], record.source) > (weights[rival.source], rival.source):
            kept[record.sha256] = record
    return tuple(kept.values())


def _weights(datasets: Sequence[Dataset]) -> dict[str, float]:
    """Weights by content: a file that is given twice weighs twice."""
    weights: dict[str, float] = {}
    for dataset in datasets:
        weights[dataset.sha256] = weights.get(dataset.sha256, 0.0) + dataset.weight
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


def _too_few(records: Sequence[Record], usable: int, held_out: int) -> str:
    prompts = len({record.split_key or record.sha256 for record in records})
    shared = f" with {prompts} different prompts" if prompts < len(records) else ""
    why = "; all rows with a prompt are on the same side" if shared else ""
    return (
        f"too few calibration rows: {len(records)} different chats{shared} give {usable} to calibrate on and "
        f"{held_out} to evaluate on, at least {FEWEST_SAMPLES} and {FEWEST_HELD_OUT} are needed{why}; "
        "pass more text with --data"
    )


def _require(problems: Sequence[str]) -> None:
    if problems:
        raise CalibrationError(list(problems))


def _shuffled(record: Record, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{record.sha256}".encode()).hexdigest()
