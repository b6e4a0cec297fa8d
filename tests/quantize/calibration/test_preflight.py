"""Preflight: samples are described, and doubtful ones are told."""

import io
from pathlib import Path
from typing import Any

import pytest

from quantize.base import read_base
from quantize.calibration.preflight import check, inspect
from quantize.calibration.samples import Samples
from quantize.errors import CalibrationError
from quantize.running.context import RunContext
from quantize.running.progress import ProgressReporter
from tests.quantize.models import write_hollow_model


def sample(number: int, tokens: int = 400, **changes: Any) -> dict[str, Any]:
    """A sample as the tokenizing child and the parent describe it."""
    return {
        "ids": [number] * tokens,
        "reasoning_tokens": tokens // 2,
        "where": f"f:{number}",
        "sha256": f"{number:064}",
        "cut_tokens": 0,
        "generated": False,
        "language": "en",
        "dedup_key": f"{number:064}",
        **changes,
    }


def many(count: int, **changes: Any) -> list[dict[str, Any]]:
    """Samples that say different things."""
    return [sample(number, **changes) for number in range(count)]


def test_samples_are_described() -> None:
    """Counts, lengths and languages, in a value and in a line."""
    taken = [
        sample(1, 40, generated=True),
        sample(2, 100, cut_tokens=7),
        sample(3, 50, language="de"),
        sample(4, 60),
    ]
    found = inspect(Samples(taken, many(9)))
    assert (found.samples, found.tokens, found.reasoning_tokens, found.generated) == (4, 250, 125, 1)
    assert (found.shortest_tokens, found.median_tokens, found.longest_tokens, found.cut) == (40, 50, 100, 1)
    assert found.languages == (("en", 3), ("de", 1))
    assert found.summary() == (
        "4 samples, 250 tokens (50% reasoning), 40 to 100 a sample, median 50, 1 cut; languages: en 3, de 1"
    )


@pytest.mark.parametrize(
    "samples,widest,notes,warnings",
    [
        (Samples(many(128), []), 5120, [], []),
        (Samples(many(20), []), 0, ["20 samples with 8000 tokens are few; 128 with 32768"], []),
        (Samples(many(128), []), 60_000, [], ["51200 tokens can't determine a layer of 60000 inputs"]),
        (Samples([*many(127), sample(300, 31)], []), 0, [], ["1 of 128 samples have fewer than 32 tokens, like f:300"]),
        (Samples(many(128), [], read_rows=100, repeated_rows=20), 0, [], []),
        (
            Samples(many(128), [], read_rows=100, repeated_rows=21),
            0,
            [],
            ["21 of 100 rows repeat others word for word"],
        ),
        (Samples([*many(127), sample(200, dedup_key="0" * 64)], []), 0, [], []),
        (
            Samples([*many(100), *(sample(number, dedup_key="0" * 64) for number in range(100, 130))], []),
            0,
            [],
            ["30 of 130 samples say nearly what others say"],
        ),
    ],
)
def test_what_is_doubtful_is_told(samples: Samples, widest: int, notes: list[str], warnings: list[str]) -> None:
    """Each in its line; what is only worth knowing is a note."""
    found = inspect(samples, widest=widest)
    for told, expected in ((found.notes, notes), (found.warnings, warnings)):
        assert len(told) == len(expected)
        assert all(line.startswith(start) for line, start in zip(told, expected, strict=True))
    assert found.problems == ()


def test_no_samples_are_a_problem() -> None:
    """There is nothing to calibrate on."""
    assert inspect(Samples([], [])).problems == ("no samples to calibrate on; pass text with --data",)


def test_what_was_found_is_said(tmp_path: Path) -> None:
    """A line for the samples, and one for each note and warning."""
    base = read_base(write_hollow_model(tmp_path / "base"))
    said = io.StringIO()
    context = RunContext(tmp_path, {}, ProgressReporter(said))
    check(base, Samples([*many(5), sample(9, 31)], []), context)
    assert [line.split(":")[0] for line in said.getvalue().splitlines()] == ["preflight"] * 3
    assert "preflight: warning: 1 of 6 samples have fewer than 32 tokens" in said.getvalue()
    with pytest.raises(CalibrationError, match="no samples to calibrate on"):
        check(base, Samples([], []), context)
